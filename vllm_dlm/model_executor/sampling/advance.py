# SPDX-License-Identifier: Apache-2.0
"""Advance: what a step's decision makes of the requests.

From a request's admission on, this alone writes where the request stands: tokens and
masks first (`write_canvas`; `moving.py` where they move), then block, canvas end, step,
frontier and what is emitted (`move_on`). A cut canvas stays cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_dlm.config.cache import FAR
from vllm_dlm.model_executor.layout import (
    ALWAYS,
    next_start,
    part_start,
    refreshes,
)
from vllm_dlm.model_executor.reply import Reply, health, put_end

if TYPE_CHECKING:
    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.planning.block_rows import Blocks
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
    masked: torch.Tensor
    """[R, B] bool: masked still, also beyond the canvas's end."""
    open: torch.Tensor
    """[R, B] bool: masked still, and it exists."""
    end: torch.Tensor
    """[R] int64: where each canvas ends."""


class Progress(NamedTuple):
    """Where R requests stand after a step; tensors are [R] int64 but for the last."""

    final: torch.Tensor
    """First position that is not final by this step."""
    frontier: torch.Tensor
    """First position that is not final. In a replay, more is final than `final` says:
    what was emitted before."""
    block_start: torch.Tensor
    step: torch.Tensor
    """Denoise steps that the active block has had."""
    is_first: torch.Tensor
    """[R] bool: the active block is its request's first."""
    phase: torch.Tensor
    """See `layout.refreshes`."""
    masked: torch.Tensor
    """[R, B] bool: masks of the active block, and of what is decided along."""


class Advance:
    """Writes a step to the request table; see the module docstring.

    Args:
        total_len: [slots] int32: the runner's own count of each request's tokens.
    """

    def __init__(
        self, slots: RequestSlots, facts: EngineFacts, total_len: torch.Tensor
    ) -> None:
        self.slots = slots
        self.facts = facts
        self.total_len = total_len

    def write_canvas(
        self, view: View, decision: SafeDecision, blocks: Blocks
    ) -> Canvas:
        """Write tokens, masks and drafts."""
        table, mask_id = self.slots, self.facts.mask_id
        commit, new_tokens = decision.commit, decision.new_tokens
        # A predicted mask (reference_exact) stays masked until the block ends.
        stays = commit & (new_tokens == mask_id) & ~decision.keeps_masks[:, None]
        tokens = torch.where(commit | decision.edit, new_tokens, view.tokens)
        tokens = torch.where(decision.remask, mask_id, tokens)
        masked = (view.masks & ~commit) | stays | decision.remask
        if decision.held is not None:
            # Not written: what is open still is fed that, and is no one's to see.
            held = decision.held.clamp(0, self.facts.vocab_size - 1)
            tokens = torch.where(masked, held, tokens)
        blocks.write(table.tokens, tokens)
        blocks.write(table.masked, masked)

        # What lies right of a cut no longer exists.
        begin, end = blocks.positions[:, 0], blocks.canvas_end
        if decision.truncate_at is not None:
            cut = decision.truncate_at
            cut_end = torch.where(cut >= 0, begin + cut + 1, end)
            end = torch.minimum(end, cut_end)
        if decision.canvas_end is not None:
            end = torch.maximum(end, decision.canvas_end)
        exists = blocks.valid & (blocks.positions < end[:, None])
        canvas = Canvas(tokens, exists, masked, masked & exists, end)
        if decision.draft_rank is not None:
            table.drafts.keep(decision, canvas.open, blocks)
        return canvas

    def show_end(self, canvas: Canvas, blocks: Blocks) -> None:
        """Write where the canvases end, for observers; else `move_on` does."""
        self.slots.canvas_end[blocks.slots] = canvas.end

    def move_on(
        self,
        measured: Measured,
        decision: SafeDecision,
        canvas: Canvas,
        blocks: Blocks,
        reply: Reply,
        *,
        counts_masks: bool,
        verifies: bool,
    ) -> None:
        """Go on in the blocks or to the next ones, and emit what became final.

        Args:
            canvas: as `write_canvas` has left it.
            counts_masks: what the requests' cache policy says of itself.
            verifies: what the strategy says of itself (`Strategy.verifies`).
            reply: to runner and scheduler; the requests' rows are written.
        """
        table, slots = self.slots, blocks.slots
        progress = self._progress(measured, decision, canvas, blocks)
        masks_end = None
        if counts_masks:
            progress = progress._replace(phase=self._phase(progress, canvas, blocks))
            masks_end = self._masks_end(progress, canvas, blocks)
        emitted = self._emit(
            progress, canvas, measured.broken, blocks, reply, masks_end, verifies
        )
        block_masks = measured.block_masks
        if block_masks is None:
            block_masks = blocks.requests.block_masks
        table.live[slots] = torch.stack(
            [
                progress.block_start,
                canvas.end,
                emitted,
                progress.step,
                block_masks,
                progress.frontier,
                progress.phase,
            ],
            dim=1,
        )

    def _progress(
        self,
        measured: Measured,
        decision: SafeDecision,
        canvas: Canvas,
        blocks: Blocks,
    ) -> Progress:
        """In which block and step each request is, and what is final."""
        open_ = canvas.open
        begin = blocks.positions[:, 0]
        end = begin + canvas.exists.sum(dim=1)
        offsets = torch.arange(open_.shape[1], device=open_.device)
        first_open = torch.where(open_, offsets, open_.shape[1]).amin(dim=1)
        done = ~open_.any(dim=1) & ~decision.hold
        final = torch.minimum(begin + first_open, end)
        # What may be rewritten, and what is held, is not final before its block is.
        waits = blocks.requests.may_rewrite | decision.hold | self._lacks_lead(blocks)
        # A lead is emitted at once: by it a replay knows that it was decided.
        final = torch.where(waits & ~done & ~blocks.leads, begin, final)
        pins, next_block = self.slots.pins, end
        if pins is not None:
            # What the request has written behind the block is text along with it.
            next_block = pins.next_block(blocks, end, canvas.end)
            final = torch.where(done, next_block, final)
            final = self._not_into_a_part(final, first_open, done, blocks)
        frontier = torch.maximum(blocks.requests.frontier, final)
        block_start = torch.where(done, next_block, begin)
        step = torch.where(done, 0, measured.view.step + decision.steps())
        # Nothing of a block that begins is written yet.
        masked = canvas.masked | (block_start != begin)[:, None]
        if measured.view.branches is not None:
            # But for what was decided along with the block before.
            length, stays = blocks.requests.block_length, done | decision.hold
            moved = torch.where(stays, 0, first_open // length * length)
            block_start, in_next = block_start + moved, offsets >= moved[:, None]
            masked = torch.where(done[:, None], masked, _from(canvas.masked, moved))
            step = torch.where(moved > 0, _steps_in(decision, in_next), step)
        if pins is not None:
            places = (block_start[:, None] + offsets).clamp(max=self.slots.length - 1)
            masked = self.slots.masked[blocks.slots[:, None], places]
        is_first = block_start <= blocks.requests.prompt_len
        phase = blocks.requests.phase
        return Progress(final, frontier, block_start, step, is_first, phase, masked)

    def _not_into_a_part(
        self,
        final: torch.Tensor,
        first_open: torch.Tensor,
        done: torch.Tensor,
        blocks: Blocks,
    ) -> torch.Tensor:
        """[R] int64: `final`, but where a sub-block begins with what the request has
        written: a step that begins a sub-block computes the whole block, and is known
        by a text that ends there."""
        part = blocks.requests.reach.part
        start = blocks.positions[:, 0] + first_open // part * part
        begins = ~done & (blocks.requests.frontier < start)
        return torch.where(begins, torch.minimum(final, start), final)

    def _phase(
        self, progress: Progress, canvas: Canvas, blocks: Blocks
    ) -> torch.Tensor:
        """[R] int64: what `layout.refreshes` calls so, for each next forward."""
        reach, step = blocks.requests.reach, progress.step
        cut = (reach.ends_early != 0) & (canvas.end < blocks.canvas_end)
        phase = torch.where(cut, ALWAYS, progress.phase)
        begins = (phase >= 0) & refreshes(reach, step, progress.is_first, 0)
        return torch.where((step == 0) | begins, progress.frontier, phase)

    def _lacks_lead(self, blocks: Blocks) -> torch.Tensor:
        """[R] bool: blocks whose lead was the mask id (`reference_exact`).

        A replay would take the first token of such a block for its lead, so none is
        emitted before the block is over. But where a step computes a sub-block, the
        scheduler knows by what was emitted which one.
        """
        block_start, prompt_len = blocks.positions[:, 0], blocks.requests.prompt_len
        has_lead = prompt_len + blocks.requests.emitted > block_start
        is_whole = blocks.requests.reach.part == FAR
        begins = self.facts.defaults.begins_with_lead(block_start, prompt_len)
        lacks: torch.Tensor = begins & ~has_lead & is_whole
        pins = self.slots.pins
        return lacks if pins is None else lacks & ~pins.is_written(blocks)

    def _emit(
        self,
        progress: Progress,
        canvas: Canvas,
        broken: torch.Tensor,
        blocks: Blocks,
        reply: Reply,
        masks_end: torch.Tensor | None,
        verifies: bool,
    ) -> torch.Tensor:
        """Hand tokens that became final to the scheduler, then where the canvas ends.

        Args:
            masks_end: [R] int64: where the next rows end, if they end with masks.
            verifies: what the strategy says of itself.

        Returns:
            [R] int64: output tokens handed over so far.
        """
        slots = blocks.slots
        prompt_len, old = blocks.requests.prompt_len, blocks.requests.emitted
        self._set_back_total(prompt_len + old, slots)
        final, pins = progress.final, self.slots.pins
        if pins is not None:
            final = torch.minimum(final, pins.handed_end(slots))
        new = torch.maximum(old, final - prompt_len)
        first = prompt_len + old
        if pins is None:
            # What is emitted lies in this block: of those before it, all was.
            places = torch.arange(blocks.width + 1, device=slots.device)
            source = (first - blocks.positions[:, 0])[:, None] + places
            new_tokens = canvas.tokens.gather(1, source.clamp(0, blocks.width - 1))
        else:
            places = torch.arange(reply.tokens.shape[1], device=slots.device)
            source = (first[:, None] + places).clamp(max=self.slots.length - 1)
            new_tokens = self.slots.tokens[slots[:, None], source].long()
        tokens, counts = put_end(
            new_tokens,
            new - old,
            canvas.end,
            # Said of a full canvas only if it was cut just now: vLLM also writes this
            # number into its row of token ids, which may end with the canvas.
            says_end=prompt_len + new < blocks.canvas_end,
        )
        if masks_end is not None:
            says = (blocks.requests.reach.follows != 0) & (progress.step > 0)
            says &= (masks_end < canvas.end) & (prompt_len + new + 1 < canvas.end)
            tokens, counts = put_end(tokens, counts, masks_end, says)
        start = self._next_start(progress, prompt_len, blocks, verifies)
        reply.write(
            blocks.batch_rows,
            tokens,
            (
                *(counts, blocks.rows_ends - start),
                health(broken, blocks.head_rows),
                *(progress.block_start, canvas.end, progress.step),
            ),
            progress.masked,
        )
        return new

    def _set_back_total(self, total: torch.Tensor, slots: torch.Tensor) -> None:
        """Have vLLM count a request's text alone.

        It has counted the last step's canvas end as a token: a step each, that would
        run past its row of token ids.
        """
        # Its table has no dummy slot: what stands for nothing adds nothing.
        slot = slots.clamp(max=self.total_len.shape[0] - 1)
        change = torch.where(slot == slots, total - self.total_len[slot], 0)
        self.total_len.index_add_(0, slot, change.to(self.total_len.dtype))

    def _next_start(
        self,
        progress: Progress,
        prompt_len: torch.Tensor,
        blocks: Blocks,
        verifies: bool,
    ) -> torch.Tensor:
        """[R] int64: where the next forward of each request starts.

        The scheduler's rule (`CanvasRequest.next_rows`), for the runner's own count.

        Args:
            verifies: what the strategy says of itself.
        """
        defaults = self.facts.defaults
        reach = blocks.requests.reach
        step, block_start = progress.step, progress.block_start
        start: torch.Tensor
        if defaults.reuses_blocks:
            # A finished block's KV is not final yet.
            decided = blocks.positions[:, 0]
            begins = step <= defaults.begins_with_lead(decided, prompt_len)
            is_whole = begins | (block_start != decided)
            frontier = torch.maximum(progress.frontier, prompt_len)
            start = part_start(reach, decided, torch.where(is_whole, decided, frontier))
            if verifies:
                # The text's last token: its keys are not final yet.
                start = block_start - 1
        else:
            start = next_start(
                reach, step, progress.is_first, block_start, progress.phase
            )
        return start

    def _masks_end(
        self, progress: Progress, canvas: Canvas, blocks: Blocks
    ) -> torch.Tensor:
        """[R] int64: where the rows of each next forward end, if the block goes on.

        Of policies whose rows reach to a mask of a certain number (`Reach.follows`),
        for the scheduler, which does not know the masks. What lies right of the block
        is masked, but for what the request has written there itself.
        """
        reach = blocks.requests.reach
        is_refresh = refreshes(reach, progress.step, progress.is_first, progress.phase)
        most = torch.where(is_refresh, reach.refresh_right, reach.right)
        numbers = canvas.open.cumsum(dim=1)
        # Behind the canvas's last mask, only a refresh computes what is written.
        begin = blocks.positions[:, 0]
        block_end = begin + canvas.exists.sum(dim=1)
        pins, behind = self.slots.pins, None
        is_last = (block_end >= canvas.end) & ~is_refresh
        if pins is not None:
            behind = pins.masks_left(blocks, block_end, canvas.end)
            is_last = (behind < most - numbers[:, -1]) & ~is_refresh
        left = numbers[:, -1] if behind is None else numbers[:, -1] + behind
        most = torch.where(is_last, torch.minimum(most, left), most)
        before = (canvas.exists & (numbers < most[:, None])).sum(dim=1)
        missing = (most - numbers[:, -1]).clamp(min=1)
        masks_end = begin + before + missing
        if pins is not None:
            further = pins.masks_end(blocks, block_end, missing)
            masks_end = torch.where(numbers[:, -1] < most, further, masks_end)
        return torch.minimum(masks_end, canvas.end)


def _steps_in(decision: SafeDecision, places: torch.Tensor) -> torch.Tensor | int:
    """[R] int64: steps of this forward that wrote in these places [R, B], the last."""
    if decision.step_ahead is None:
        return 0
    ahead = torch.where(decision.commit, decision.step_ahead, 0)
    return ahead.amax(dim=1) - torch.where(places, 0, ahead).amax(dim=1)


def _from(masked: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """[R, B] bool: the columns of `masked` from `first` [R] on, True behind them."""
    width = masked.shape[1]
    source = torch.arange(width, device=masked.device) + first[:, None]
    there = masked.gather(1, source.clamp(max=width - 1))
    return there | (source >= width)
