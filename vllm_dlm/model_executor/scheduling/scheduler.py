# SPDX-License-Identifier: Apache-2.0
"""DiffusionStepScheduler: which request computes which rows next.

vLLM's scheduler advances a request from `num_computed_tokens` to `num_tokens`. A
diffusion request goes round instead: every denoise step computes its active block
again and, with full attention, the rest of prompt and canvas. So before each step this
subclass says, per running request, where the rows begin (`num_computed_tokens`) and end
(`CanvasRequest.rows_end`). Admission, budgets, KV pages, prefix caching, preemption,
priorities and aborts are vLLM's.

A waiting request counts its first block (with full attention, its first canvas) among
its tokens: its first forward is its first denoise step. There is no prompt-only
forward, unless a prompt is longer than a forward's token budget.

In the worker's reply, a request's sampled tokens are those that became final,
contiguous from the left. Behind them the reply may say where the canvas now ends: it
may be cut, and with the option `growth` it may grow before a block begins. `reply.py`
lists what else travels, and where.
"""

from __future__ import annotations

import time
from itertools import islice
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.diffusion_scheduler import DiffusionScheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request, RequestStatus
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_dlm.admission import broken_logits
from vllm_dlm.config.carried import PATTERN, request_config
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.request import server_config
from vllm_dlm.config.stop_ids import closing_ids
from vllm_dlm.config.tccf import Stages
from vllm_dlm.metrics import COUNTERS
from vllm_dlm.model_executor.clean_pages import note_device
from vllm_dlm.model_executor.layout import Limits, Rows
from vllm_dlm.model_executor.patterns import pattern_of
from vllm_dlm.model_executor.planning.branch_pages import page_size_of
from vllm_dlm.model_executor.running_ahead import runs_ahead
from vllm_dlm.model_executor.scheduling.branch_shares import BranchShares
from vllm_dlm.model_executor.scheduling.canvas_request import CanvasRequest, Forward
from vllm_dlm.model_executor.scheduling.page_publishing import FinalBlocksKVCacheManager
from vllm_dlm.model_executor.scheduling.shrinking import leave_out
from vllm_dlm.model_executor.scheduling.stages import drop_its_end, is_thought_out
from vllm_dlm.model_executor.scheduling.step_outcome import StepOutcome, take_apart
from vllm_dlm.model_executor.scheduling.turns import Turns
from vllm_dlm.strategies import STRATEGIES

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput

logger = init_logger(__name__)

UNMATCHED = (
    "the text does not match the pattern that it was to match, which is an error of "
    "this server"
)
"""The `stop_reason` of such an output."""

TO_THE_END = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
"""Ends that a text with a pattern comes to by itself."""


class DiffusionStepScheduler(DiffusionScheduler):
    """Schedules denoise steps; see the module docstring."""

    max_num_active_reqs: int
    """vLLM's: requests that may run; `_reserve_prefill_lookahead` ends admissions."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        note_device(vllm_config.device_config.device_type)
        super().__init__(vllm_config, *args, **kwargs)
        self.dlm_server = server_config(self.vllm_config)
        hf_config = self.vllm_config.model_config.hf_config
        self.dlm_defaults = ModelDefaults.from_hf_config(hf_config)
        self.dlm_limits = Limits(hf_config.canvas_length, self.max_model_len)
        # vLLM builds the manager; our class of it says which pages may be shared.
        FinalBlocksKVCacheManager.take_over(self.kv_cache_manager)
        self._page_size = page_size_of(self.kv_cache_config)
        self._at_second_stage: list[CanvasRequest] = []
        """Requests whose first stage (`tccf`) ended with the step in flight."""
        self._branches = BranchShares(
            self.kv_cache_manager,
            page_size=self._page_size,
            max_rows=self.max_num_scheduled_tokens,
            max_model_len=self.max_model_len,
            rows_of_graphs=self.num_spec_tokens,
        )
        self._turns = Turns(self.max_num_scheduled_tokens)
        self._is_async = bool(vllm_config.scheduler_config.async_scheduling)
        self._work = [0] * len(COUNTERS)
        """Work done since the last statistics, in the order of `metrics.COUNTERS`."""
        self._broken: frozenset[str] = frozenset()
        """Requests of the step in flight whose logits are broken."""
        self._reports = broken_logits.Reports(
            self.vllm_config.model_config.served_model_name
        )

    # -- admission ---------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Lay a new request out and enqueue it."""
        if not isinstance(request, CanvasRequest):
            params = request.sampling_params
            config = request_config(
                params.extra_args, self.dlm_server, self.dlm_defaults
            )
            config = config.sized(params.max_tokens, self.dlm_limits.max_canvas)
            branches = self._branches.most_of(config, params)
            adopted = CanvasRequest.adopt(
                request,
                config,
                self.dlm_defaults,
                self.dlm_limits,
                stages=Stages.of(config.tccf, self.vllm_config.model_config),
                commits_alone=self.dlm_server.commit == "separate",
                max_branches=branches,
                needs_branches=STRATEGIES[config.strategy].needs_branches,
                ahead=self._branches.rows_ahead(config) if branches > 1 else 0,
            )
            if adopted.needs_branches:
                self._branches.limit(adopted)
            # Of the parameters that the worker sees, too.
            adopted.runs_ahead = self._is_async and runs_ahead(
                config, params, self.dlm_defaults, self.dlm_server
            )
            adopted.blocks_ahead = self.dlm_server.async_blocks
            adopted.closing_ids = closing_ids(
                params, self.dlm_defaults, self.vllm_config.model_config.hf_config
            )
        super().add_request(request)

    # -- one step ----------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule one forward: each running request's rows, then admissions."""
        for request in self.running:
            request.plan_step()
        # Requests that may be admitted in this step come before drafts.
        free = max(self.max_num_running_reqs - len(self.running), 0)
        self._branches.hand_out(self.running, list(islice(self.waiting, free)))
        first, step = self._may_be_admitted(), self.current_step + 1
        self._turns.allot(self.running, first, step)
        seats = self.max_num_active_reqs
        try:
            output = super().schedule(throttle_prefills)
        finally:
            self.max_num_active_reqs = seats
        for request_id, num_rows in output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            request.last_step = self.current_step
            # vLLM has counted the rows as computed already.
            start = request.num_computed_tokens - num_rows
            branches = self._branches.settle(output, request, start, num_rows)
            rows = Rows(start, start + num_rows // branches)
            request.note_computed(rows)
            request.in_flight.append(Forward(rows, branches))
            self.kv_cache_manager.publish(request, request.kv_final)
        return output

    def _may_be_admitted(self) -> CanvasRequest | None:
        """The first of the waiting requests, if it lacks nothing but rows."""
        if not self.waiting or len(self.running) >= self.max_num_running_reqs:
            return None
        first = self.waiting.peek_request()
        assert isinstance(first, CanvasRequest)
        pages = -(-first.planned_rows().end // self._page_size)
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return first if pages <= free else None

    # -- the token budget --------------------------------------------------

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Cut rows that exceed the token budget where they may be cut.

        vLLM asks here last how many rows of a request a forward takes. With 0 the
        request sits this step out. If that request is waiting, none is admitted behind
        it in this step: smaller requests would, step after step, take the rows that it
        waits for. (vLLM tries the next ones, from 0.33 on.)
        """
        assert isinstance(request, CanvasRequest)
        is_running = request.status == RequestStatus.RUNNING
        if is_running:
            num_new_tokens = min(num_new_tokens, request.allotted)
        end = num_computed_tokens + num_new_tokens
        rows = request.whole_rows(num_computed_tokens, end)
        if rows == 0 and not is_running:
            self.max_num_active_reqs = 0  # until this step is scheduled
        return rows

    # -- the outcome of a step ---------------------------------------------

    def update_from_output(
        self,
        scheduler_output: SchedulerOutput,
        model_runner_output: ModelRunnerOutput,
    ) -> dict[int, EngineCoreOutputs]:
        """Take the worker's reply apart, then let vLLM append and stop."""
        requests = self._take_forwards(scheduler_output)
        outcome = take_apart(model_runner_output, requests)
        self._note_outcome(scheduler_output.total_num_scheduled_tokens, outcome)
        shrinking = {
            name: request
            for name, request in requests.items()
            if request.dlm.canvas is not None and request.dlm.canvas.shrinks
        }
        begins = {name: one.num_output_tokens for name, one in shrinking.items()}
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._begin_second_stages()
        for of_client in outputs.values():
            outcome.put_step_maps(of_client.outputs)
            if shrinking:
                leave_out(of_client.outputs, shrinking, begins)
        outcome.put_frames(outputs, requests)
        for request in self.running:
            request.go_on()
        return outputs

    def _take_forwards(
        self, scheduler_output: SchedulerOutput
    ) -> dict[str, CanvasRequest]:
        """Take the forwards whose outcome is there, and count their canvas rows.

        Returns:
            Their requests, but for those that are not there any more, or have been
            preempted since: their forwards are as if they had not been.
        """
        requests, counts = {}, {}
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(request_id)
            if request is None:
                continue
            forward = request.in_flight.popleft()
            if request.num_stale_output_tokens > 0:
                continue
            requests[request_id] = request
            canvas_rows = request.canvas_rows(forward.rows)
            counts[request_id] = range(forward.branches * canvas_rows)
            if canvas_rows == 0 and request.block_start != request.layout.first_block:
                # vLLM counts no forward that decides nothing, as the prompt's parts.
                request.spec_decode_metrics.observe(0, 0)
        # vLLM counts a forward as one "draft": name the canvas rows it evaluated, so
        # that its diffusion metrics and the per-request ones are right.
        scheduler_output.scheduled_spec_decode_tokens = counts
        return requests

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        """Append and stop as vLLM does; a canvas cut inside a block stops too."""
        if request.request_id in self._broken:
            request.status = RequestStatus.FINISHED_ERROR
            request.resumable = False
            request.stop_reason = broken_logits.REASON
            return [], True
        assert isinstance(request, CanvasRequest)
        barred = request.num_barred(new_token_ids)
        request.append_output_token_ids(new_token_ids[:barred])
        rest, stopped = super()._update_request_with_output(
            request, new_token_ids[barred:], is_stale
        )
        new_token_ids = [*new_token_ids[:barred], *rest]
        if is_thought_out(request, self.max_model_len):
            assert request.stages is not None
            self._at_second_stage.append(request)
            thoughts = drop_its_end(request, new_token_ids)
            check, stopped = super()._update_request_with_output(
                request, list(request.stages.check), is_stale
            )
            return [*thoughts, *check], stopped
        if not stopped and (request.was_cut() or request.is_filled):
            # The last token of a text that stops is its end, for vLLM, and not shown.
            is_open = request.output_token_ids[-1] not in request.closing_ids
            request.status = TO_THE_END[is_open]
            stopped = True
        if stopped and not self._matches(request):
            request.status = RequestStatus.FINISHED_ERROR
            request.stop_reason = UNMATCHED
            self._work[-1] += 1
            logger.error("Request %s: %s", request.request_id, UNMATCHED)
            return [], True
        return new_token_ids, stopped

    def _matches(self, request: CanvasRequest) -> bool:
        """Whether a text that has come to its end matches its pattern, if it has one.

        It does by the way it is written; this is the proof.
        """
        params = request.sampling_params
        pattern = (params.extra_args or {}).get(PATTERN)
        if pattern is None or request.status not in TO_THE_END:
            return True
        compiled = pattern_of(
            self.vllm_config.model_config,
            pattern,
            params,
            sorted(request.stop_ids),
            self.dlm_defaults.no_text,
        )
        return compiled.matches(list(request.output_token_ids))

    def _note_outcome(self, num_rows: int, outcome: StepOutcome) -> None:
        """Note which requests are broken; count them, and rows, for `/metrics`."""
        self._broken = outcome.broken
        step = (num_rows, outcome.head_rows, len(outcome.broken), 0)
        self._work = [sum(counts) for counts in zip(self._work, step, strict=True)]
        line = self._reports.add(len(outcome.broken))
        if line is not None:
            logger.error(line)

    def _begin_second_stages(self) -> None:
        """Preempt requests that go on in blocks of one (`tccf.py`).

        The same text has other KV in blocks of one, so all of it is computed again.
        """
        entering, self._at_second_stage = self._at_second_stage, []
        for request in entering:
            if request.status != RequestStatus.RUNNING:
                continue  # The check text filled or ended the output.
            request.enter_second_stage()
            self.running.remove(request)
            self._preempt_request(request, time.monotonic(), drop_stale_output=True)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        """Count denoise steps, canvas positions evaluated and tokens finalized."""
        if not self.log_stats:
            return None
        stats = spec_decoding_stats
        if stats is None:
            stats = SpecDecodingStats.new(0)
        stats.num_drafts += 1
        stats.num_draft_tokens += num_draft_tokens
        stats.num_accepted_tokens += num_accepted_tokens
        return stats

    def make_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> SchedulerStats | None:
        """Add the work of the steps to vLLM's statistics.

        Also where no statistics came with a step, because its requests were aborted.
        """
        if self.log_stats and any(self._work):
            if spec_decoding_stats is None:
                spec_decoding_stats = SpecDecodingStats.new(0)
            spec_decoding_stats.num_draft_tokens_per_pos = self._work
            self._work = [0] * len(COUNTERS)
        return super().make_stats(spec_decoding_stats, *args, **kwargs)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Nothing: the canvas lives in the worker, no draft tokens travel."""

    def _preempt_request(
        self, request: Request, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        """Preempt; the request later replays its active block from the start.

        The block's decisions follow from the tokens left of it, the canvas width and
        the request's seed alone, so a replay gives the same tokens. Pages of finished
        blocks may still be found by prefix caching. What is in flight is dropped.
        """
        assert isinstance(request, CanvasRequest)
        request.start_over()
        super()._preempt_request(request, timestamp, drop_stale_output=True)
