# SPDX-License-Identifier: Apache-2.0
"""DiffusionStepScheduler: which request computes which rows next.

vLLM's scheduler advances a request from `num_computed_tokens` to `num_tokens`. A
diffusion request goes round instead: every denoise step computes its active block
again, in class A all else too. So before each step this subclass says, per running
request, where its rows begin (`num_computed_tokens`) and end
(`CanvasRequest.rows_end`), and leaves admission, budgets, KV pages, prefix caching,
preemption, priorities and aborts to vLLM.

A waiting request counts its first block (class A: its first canvas) among its tokens:
its first forward is its first denoise step. There is no prompt-only forward, unless a
prompt is longer than a forward's token budget.

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

from vllm_dlm.model_defaults import ModelDefaults
from vllm_dlm.model_executor.canvas_request import (
    CanvasRequest,
    FinalBlocksKVCacheManager,
)
from vllm_dlm.request import stop_ids
from vllm_dlm.request_config import resolve, server_config

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput


class DiffusionStepScheduler(DiffusionScheduler):
    """Schedules denoise steps; see the module docstring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dlm_server = server_config(self.vllm_config)
        hf_config = self.vllm_config.model_config.hf_config
        self.dlm_defaults = ModelDefaults.from_hf_config(hf_config)
        self.max_canvas: int = hf_config.canvas_length
        # vLLM builds it; only its class says which pages may be shared.
        self.kv_cache_manager.__class__ = FinalBlocksKVCacheManager
        self._canvas_rows: dict[str, int] = {}
        """Canvas rows that each request of the step in flight evaluates."""

    # -- admission ---------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Give a request its canvas and enqueue it."""
        if not isinstance(request, CanvasRequest):
            params = request.sampling_params
            # vLLM builds the request; only its class says how tokens are counted.
            request.__class__ = CanvasRequest
            request.model = self.dlm_defaults
            request.dlm = resolve(self.dlm_server, params.extra_args, self.dlm_defaults)
            request.dlm = request.dlm.sized(params.max_tokens, self.max_canvas)
            request.origin = self.dlm_defaults.origin(
                request.num_prompt_tokens, request.dlm.block_length
            )
            if not params.ignore_eos:
                # Ids that end a text but are known to the tokenizer only.
                params.stop_token_ids = sorted(
                    {*(params.stop_token_ids or ()), *self.dlm_defaults.stop_ids}
                )
            request.stop_ids = stop_ids(params)
            # Forwards and tokens per forward, on every request's output.
            request.spec_decode_metrics = RequestSpecDecodeMetrics.new(
                request.dlm.block_length
            )
            request.open_canvas(self.max_canvas, self.max_model_len)
            request.begin()
        super().add_request(request)

    # -- one step ----------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule one forward: each running request's rows, then admissions."""
        for request in self.running:
            request.num_computed_tokens, request.rows_end = request.next_rows()
        output = super().schedule(throttle_prefills)
        self._canvas_rows = {}
        for request_id, num_rows in output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            # vLLM has counted the rows as computed already.
            end = request.num_computed_tokens
            self._canvas_rows[request_id] = request.computed(end - num_rows, end)
            self.kv_cache_manager.cache_blocks(request, request.kv_final)
        # Who sat out goes first next time. (A stable sort: False before True.)
        self.running.sort(key=lambda r: r.request_id in output.num_scheduled_tokens)
        return output

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Cut rows that exceed the token budget where they may be cut.

        vLLM's last word on how many rows of a request a forward takes; with 0 the
        request sits this step out.
        """
        assert isinstance(request, CanvasRequest)
        end = num_computed_tokens + num_new_tokens
        return request.whole_rows(num_computed_tokens, end)

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
            request_id: range(num_rows)
            for request_id, num_rows in self._canvas_rows.items()
        }
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in self.running:
            if request.num_tokens == request.canvas_end:
                request.open_canvas(self.max_canvas, self.max_model_len)
            elif request.refreshed_block != request.block_start:
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
            and request.num_tokens != request.block_start
        ):
            request.status = RequestStatus.FINISHED_STOPPED
            stopped = True
        return new_token_ids, stopped

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
        the request's seed alone, so a replay gives the same tokens. Pages of finished
        blocks may still be found by prefix caching.
        """
        assert isinstance(request, CanvasRequest)
        request.canvas_end = request.block_canvas_end
        request.begin()
        super()._preempt_request(request, timestamp, drop_stale_output)
