# SPDX-License-Identifier: Apache-2.0
"""Advance: what a step's decision makes of the requests.

From a request's admission on, this alone writes where the request stands: tokens, masks
and canvas end first (`write_canvas`), then block, step and frontier, then what is
emitted (`move_on`). A cut canvas stays cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_dlm.config.cache import FAR, Reach
from vllm_dlm.model_executor.layout import next_start, part_start
from vllm_dlm.model_executor.reply import put_canvas_end

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.states import RequestState

    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.planning.step_plan import SegmentPlan
    from vllm_dlm.model_executor.sampling.logprobs import RevealedLogprobs
    from vllm_dlm.model_executor.sampling.safety import SafeDecision
    from vllm_dlm.model_executor.sampling.views import Measured
    from vllm_dlm.model_executor.slots import RequestSlots
    from vllm_dlm.strategies.base import View


class Canvas(NamedTuple):
    """The active blocks [R, B] as a step leaves them."""

    tokens: torch.Tensor
    """[R, B] int64."""
    exists: torch.Tensor
    """[R, B] bool: of the block, and left of the canvas's end."""
    open: torch.Tensor
    """[R, B] bool: masked still."""
    end: torch.Tensor
    """[R] int64: where each canvas ends."""


class Progress(NamedTuple):
    """Where R requests stand after a step; every tensor is [R] int64."""

    final: torch.Tensor
    """First position that is not final by this step."""
    frontier: torch.Tensor
    """First position that is not final. In a replay, more is final than `final` says:
    what was emitted before."""
    before: torch.Tensor
    """`frontier` before the step."""
    block_start: torch.Tensor
    step: torch.Tensor
    """Denoise steps that the active block has had."""


class Advance:
    """Writes a step to the request table; see the module docstring."""

    def __init__(
        self,
        slots: RequestSlots,
        facts: EngineFacts,
        req_states: RequestState,
        logprobs: RevealedLogprobs,
    ) -> None:
        self.slots = slots
        self.facts = facts
        self.req_states = req_states
        self.logprobs = logprobs

    def write_canvas(
        self, view: View, decision: SafeDecision, plan: SegmentPlan
    ) -> Canvas:
        """Write tokens, masks, drafts, and where the canvases end now."""
        table, mask_id = self.slots, self.facts.mask_id
        commit, new_tokens = decision.commit, decision.new_tokens
        # A predicted mask (reference_exact) stays masked until the block ends.
        stays = commit & (new_tokens == mask_id) & ~decision.keeps_masks[:, None]
        tokens = torch.where(commit | decision.edit, new_tokens, view.tokens)
        tokens = torch.where(decision.remask, mask_id, tokens)
        masked = (view.masks & ~commit) | stays | decision.remask
        plan.cells.write(table.tokens, tokens)
        plan.cells.write(table.masked, masked)

        # What lies right of a cut no longer exists.
        end = plan.canvas_end
        if decision.truncate_at is not None:
            cut = decision.truncate_at
            cut_end = torch.where(cut >= 0, plan.positions[:, 0] + cut + 1, end)
            end = torch.minimum(end, cut_end)
        table.canvas_end[plan.slots] = end
        exists = view.valid & (plan.positions < end[:, None])
        canvas = Canvas(tokens, exists, masked & exists, end)
        if decision.draft_rank is not None:
            table.drafts.keep(decision, canvas.open, plan.cells)
        return canvas

    def move_on(
        self,
        measured: Measured,
        decision: SafeDecision,
        canvas: Canvas,
        plan: SegmentPlan,
    ) -> SamplerOutput:
        """Go on in the blocks or to the next ones, and emit what became final.

        Args:
            canvas: as `write_canvas` has left it.

        Returns:
            The reply to runner and scheduler.
        """
        progress = self._write_progress(measured, decision, canvas, plan)
        self._send_to_host(progress.block_start, canvas.end, plan)
        return self._emit(progress, canvas.end, plan)

    def _write_progress(
        self,
        measured: Measured,
        decision: SafeDecision,
        canvas: Canvas,
        plan: SegmentPlan,
    ) -> Progress:
        """Write in which block and step each request is, and what is final."""
        table, slots, open_ = self.slots, plan.slots, canvas.open
        begin = plan.positions[:, 0]
        end = begin + canvas.exists.sum(dim=1)
        offsets = torch.arange(open_.shape[1], device=open_.device)
        first_open = torch.where(open_, offsets, open_.shape[1]).amin(dim=1)
        done = ~open_.any(dim=1) & ~decision.hold
        final = torch.minimum(begin + first_open, end)
        # What may be rewritten, and what is held, is not final before its block is.
        waits = table.may_rewrite[slots] | decision.hold | self._lacks_lead(plan)
        # A lead is emitted at once: by it a replay knows that it was decided.
        final = torch.where(waits & ~done & ~plan.leads, begin, final)
        before = table.frontier[slots]
        progress = Progress(
            final,
            torch.maximum(before, final),
            before,
            block_start=torch.where(done, end, begin),
            step=torch.where(done, 0, measured.view.step + decision.steps()),
        )
        table.block_start[slots] = progress.block_start
        table.step[slots] = progress.step
        table.frontier[slots] = progress.frontier
        if measured.block_masks is not None:
            table.block_masks[slots] = measured.block_masks
        return progress

    def _lacks_lead(self, plan: SegmentPlan) -> torch.Tensor:
        """[R] bool: blocks whose lead was the mask id (`reference_exact`).

        A replay would take the first token of such a block for its lead, so none is
        emitted before the block is over. But where a step computes a sub-block, the
        scheduler knows by what was emitted which one.
        """
        table, slots = self.slots, plan.slots
        block_start, prompt_len = plan.positions[:, 0], table.prompt_len[slots]
        has_lead = prompt_len + table.emitted[slots] > block_start
        is_whole = table.reach[slots, Reach._fields.index("part")] == FAR
        begins = self.facts.defaults.begins_with_lead(block_start, prompt_len)
        lacks: torch.Tensor = begins & ~has_lead & is_whole
        return lacks

    def _send_to_host(
        self, block_start: torch.Tensor, canvas_end: torch.Tensor, plan: SegmentPlan
    ) -> None:
        """Send what the next forward's rows follow from (`planning/step_plan.py`)."""
        table = self.slots
        offsets = torch.arange(plan.positions.shape[1], device=block_start.device)
        positions = block_start[:, None] + offsets
        positions = positions.clamp(max=table.length - 1)
        masked = table.masked[plan.slots[:, None], positions]
        table.host.send(plan.slots_np, block_start, canvas_end, masked)

    def _emit(
        self, progress: Progress, canvas_end: torch.Tensor, plan: SegmentPlan
    ) -> SamplerOutput:
        """Hand tokens that became final to the scheduler, then where the canvas ends.

        Args:
            canvas_end: [R] int64, a position.
        """
        table, slots = self.slots, plan.slots
        prompt_len, old = table.prompt_len[slots], table.emitted[slots]
        # vLLM has counted the last step's canvas end as a token: a step each, that
        # would run past its row of token ids.
        self.req_states.total_len.gpu[slots] = (prompt_len + old).to(torch.int32)
        new = torch.maximum(old, progress.final - prompt_len)
        table.emitted[slots] = new
        places = torch.arange(plan.positions.shape[1] + 1, device=slots.device)
        source = (prompt_len + old)[:, None] + places
        source = source.clamp(max=table.length - 1)
        sampled, num_sampled = put_canvas_end(
            table.tokens[slots[:, None], source].long(),
            new - old,
            canvas_end,
            # Said of a full canvas only if it was cut just now: vLLM also writes this
            # number into its row of token ids, which may end with the canvas.
            says_end=prompt_len + new < plan.canvas_end,
        )
        start = self._next_start(progress, prompt_len, plan)
        return SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=self.logprobs.emit(old, new, plan),
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=(plan.rows_ends - start).int(),
        )

    def _next_start(
        self, progress: Progress, prompt_len: torch.Tensor, plan: SegmentPlan
    ) -> torch.Tensor:
        """[R] int64: where the next forward of each request starts.

        The scheduler's rule (`CanvasRequest.next_rows`), for the runner's own count.
        """
        defaults = self.facts.defaults
        reach = Reach(*self.slots.reach[plan.slots].unbind(dim=1))
        step, block_start = progress.step, progress.block_start
        start: torch.Tensor
        if defaults.reuses_blocks:
            # A finished block's KV is not final yet.
            decided = plan.positions[:, 0]
            begins = step <= defaults.begins_with_lead(decided, prompt_len)
            is_whole = begins | (block_start != decided)
            frontier = torch.maximum(progress.frontier, prompt_len)
            start = part_start(reach, decided, torch.where(is_whole, decided, frontier))
        else:
            is_first = block_start <= prompt_len
            start = next_start(reach, step, is_first, block_start, progress.before)
        return start
