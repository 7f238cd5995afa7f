# SPDX-License-Identifier: Apache-2.0
"""DiffusionStepScheduler: which request computes which rows next.

vLLM's scheduler advances a request from `num_computed_tokens` to `num_tokens`. A
diffusion request goes round instead: every denoise step computes its rows again. So
before each step this subclass says, per running request, where its rows begin
(`num_computed_tokens`) and end (`CanvasRequest.rows_end`), and leaves admission,
budgets, KV pages, preemption, priorities and aborts to vLLM.

A waiting request counts its first canvas among its tokens: it is admitted only where
prompt and canvas fit, and its first forward is its first denoise step. There is no
prompt-only forward.

The worker's reply: a request's sampled tokens are those that became final, contiguous
from the left; behind them one negative number, `-(canvas_end + 1)`, says where the
canvas now ends (a strategy may cut it, never lengthen it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.diffusion_scheduler import DiffusionScheduler
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request, RequestStatus
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_dlm.config import RequestConfig, resolve, server_config
from vllm_dlm.model_defaults import ModelDefaults
from vllm_dlm.model_executor.cache import canvas_width, plan_rows
from vllm_dlm.request import stop_ids

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput


class CanvasRequest(Request):
    """A vLLM request with a canvas; made of one by `DiffusionStepScheduler`."""

    dlm: RequestConfig
    stop_ids: frozenset[int]
    """Token ids that end the text."""
    canvas_end: int
    """Absolute position one past the canvas' last token."""
    block_canvas_end: int
    """`canvas_end` when the active block began: where a replay of it starts from."""
    refreshed_block: int
    """Index of the block whose surroundings the KV pages hold; -1 for none."""
    rows_end: int
    """One past the last position of the rows to compute next."""

    @property
    def num_tokens(self) -> int:
        """Tokens so far; while waiting, with the canvas that admission must fit."""
        if self.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
            return self.canvas_end
        return len(self._all_token_ids)

    @property
    def num_tokens_with_spec(self) -> int:
        """What vLLM schedules up to."""
        return self.rows_end

    def num_tokens_to_stop(self, tokens: list[int]) -> int:
        """How many of the tokens that follow the output belong to the text."""
        for count, token in enumerate(tokens, start=1):
            if token in self.stop_ids:
                return count
        return len(tokens)

    @property
    def block_index(self) -> int:
        """Index of the active block, counted from the prompt's end."""
        return self.num_output_tokens // self.dlm.block_length

    @property
    def block_start(self) -> int:
        """Absolute position of the active block's first token."""
        return self.num_prompt_tokens + self.block_index * self.dlm.block_length


class DiffusionStepScheduler(DiffusionScheduler):
    """Schedules denoise steps; see the module docstring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dlm_server = server_config(self.vllm_config)
        hf_config = self.vllm_config.model_config.hf_config
        self.dlm_defaults = ModelDefaults.from_hf_config(hf_config)
        self.max_canvas: int = hf_config.canvas_length

    # -- admission ---------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Give a request its canvas and enqueue it."""
        if not isinstance(request, CanvasRequest):
            params = request.sampling_params
            # vLLM builds the request; only its class says how tokens are counted.
            request.__class__ = CanvasRequest
            request.dlm = resolve(self.dlm_server, params.extra_args, self.dlm_defaults)
            if not params.ignore_eos:
                # Ids that end a text but are known to the tokenizer only.
                params.stop_token_ids = sorted(
                    {*(params.stop_token_ids or ()), *self.dlm_defaults.stop_ids}
                )
            request.stop_ids = stop_ids(params)
            request.refreshed_block = -1
            # Forwards and tokens per forward, on every request's output.
            request.spec_decode_metrics = RequestSpecDecodeMetrics.new(
                request.dlm.block_length
            )
            self._open_canvas(request)
        super().add_request(request)

    def _open_canvas(self, request: CanvasRequest) -> None:
        """Give a request the canvas for (the rest of) its output."""
        block = request.dlm.block_length
        begin = request.num_prompt_tokens + request.num_output_tokens
        wanted = request.max_tokens - request.num_output_tokens
        width = canvas_width(wanted, block, self.max_canvas)
        request.canvas_end = min(begin + width, self.max_model_len)
        request.block_canvas_end = request.canvas_end
        request.rows_end = request.canvas_end

    # -- one step ----------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule one forward: each running request's rows, then admissions."""
        budget = self.max_num_scheduled_tokens
        for request in self.running:
            refresh = request.refreshed_block != request.block_index
            start, request.rows_end = plan_rows(
                request.dlm.cache,
                refresh,
                request.block_start,
                request.dlm.block_length,
                request.canvas_end,
            )
            request.num_computed_tokens = start
            budget -= request.rows_end - start
            if budget < 0:
                # A part of a request's rows is a wrong forward: it sits this step
                # out. (vLLM counts the step before it checks eligibility.)
                budget += request.rows_end - start
                request.next_decode_eligible_step = self.current_step + 2
        output = super().schedule(throttle_prefills)
        for request_id in output.num_scheduled_tokens:
            request = self.requests[request_id]
            request.refreshed_block = request.block_index
        # Who sat out goes first next time. (A stable sort: False before True.)
        self.running.sort(key=lambda r: r.request_id in output.num_scheduled_tokens)
        return output

    def update_from_output(
        self,
        scheduler_output: SchedulerOutput,
        model_runner_output: ModelRunnerOutput,
    ) -> dict[int, EngineCoreOutputs]:
        """Take the worker's reply apart, then let vLLM append and stop."""
        for row, tokens in enumerate(model_runner_output.sampled_token_ids or ()):
            request = self.requests.get(model_runner_output.req_ids[row])
            if request is None or not tokens:
                continue
            if tokens[-1] < 0:
                canvas_end = -tokens.pop() - 1
                request.canvas_end = min(request.canvas_end, canvas_end)
            # What became final behind the end of the text is padding: not counted.
            del tokens[request.num_tokens_to_stop(tokens) :]
        # vLLM counts a forward as one "draft": name the canvas rows it evaluated, so
        # that its diffusion metrics and the per-request ones are right.
        scheduler_output.scheduled_spec_decode_tokens = {
            request_id: range(self._canvas_rows(request_id, num_rows))
            for request_id, num_rows in scheduler_output.num_scheduled_tokens.items()
        }
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in self.running:
            if request.num_tokens == request.canvas_end:
                self._open_canvas(request)
            elif request.refreshed_block != request.block_index:
                request.block_canvas_end = request.canvas_end
        return outputs

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        """Append and stop as vLLM does; a canvas cut inside a block stops too.

        Its strategy said that the text ends there, also where no stop token came. A cut
        at a block's end drops padding only: without a stop token the text goes on, on a
        further canvas.
        """
        new_token_ids, stopped = super()._update_request_with_output(
            request, new_token_ids, is_stale
        )
        assert isinstance(request, CanvasRequest)
        if (
            not stopped
            and request.num_tokens == request.canvas_end < request.block_canvas_end
            and request.num_output_tokens % request.dlm.block_length
        ):
            request.status = RequestStatus.FINISHED_STOPPED
            stopped = True
        return new_token_ids, stopped

    def _canvas_rows(self, request_id: str, num_rows: int) -> int:
        """How many of the rows just computed for a request were canvas."""
        request = self.requests.get(request_id)
        if request is None or request.num_computed_tokens > num_rows:
            return num_rows
        return num_rows - request.num_prompt_tokens

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        """Denoise steps, canvas positions evaluated and tokens finalized."""
        if not self.log_stats:
            return None
        stats = spec_decoding_stats or SpecDecodingStats.new(0)
        stats.num_drafts += 1
        stats.num_draft_tokens += num_draft_tokens
        stats.num_accepted_tokens += num_accepted_tokens
        return stats

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Nothing: the canvas lives in the worker, no draft tokens travel."""

    def _preempt_request(
        self, request: Request, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        """Preempt; the request later replays its active block from the start.

        The block's decisions follow from the tokens left of it, the canvas width and
        the request's seed alone, so a replay gives the same tokens.
        """
        assert isinstance(request, CanvasRequest)
        request.canvas_end = request.block_canvas_end
        request.refreshed_block = -1
        super()._preempt_request(request, timestamp, drop_stale_output)
