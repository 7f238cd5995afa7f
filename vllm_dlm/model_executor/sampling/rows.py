# SPDX-License-Identifier: Apache-2.0
"""Rows: from a step's logits to one candidate and its statistics per row.

The mask id is never predicted, unless `reference_exact` asks for it. Logits come a tile
at a time (`logits.py`); what stays of a tile are a few numbers per row, in memory that
all steps use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_dlm.kernels.mixtures import mixtures
from vllm_dlm.kernels.token_stats import write_stats
from vllm_dlm.model_executor.sampling.choice import Choice, Tile
from vllm_dlm.model_executor.sampling.logits import Head, Logits
from vllm_dlm.model_executor.sampling.scheduled import Scheduled, choose
from vllm_dlm.model_executor.sampling.soft_memory import keep_mixtures

if TYPE_CHECKING:
    from vllm_dlm.model_executor.constrained import Constrained
    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.planning.block_rows import BlockRows
    from vllm_dlm.model_executor.planning.step_plan import SegmentPlan
    from vllm_dlm.model_executor.sampling.candidates import Candidates
    from vllm_dlm.model_executor.slots import RequestSlots


class Drawn(NamedTuple):
    """R blocks of whose rows some are drawn or restricted."""

    blocks: BlockRows
    masked: torch.Tensor
    """[R, B] bool: positions that may be written."""
    step: torch.Tensor
    """[R] int64: which noise is drawn with."""


class Mixing(NamedTuple):
    """R blocks of whose rows the mixtures of all tokens are kept (`soft_memory.py`)."""

    blocks: BlockRows
    memory: torch.Tensor
    """[seats + 1, B, H]: of the group."""


def _rows_of(blocks: BlockRows, rows: slice) -> tuple[slice, slice]:
    """Rows of a step that belong to some blocks, of the rows of a tile.

    Returns:
        They, and the same counted from the first row of the blocks. Empty slices may
        end before they start.
    """
    first, last = blocks.first_row, blocks.first_row + blocks.num_rows
    part = slice(max(rows.start, first), min(rows.stop, last))
    return part, slice(part.start - first, part.stop - first)


class Rows:
    """Measures the rows of each step; see the module docstring."""

    def __init__(
        self,
        slots: RequestSlots,
        facts: EngineFacts,
        head: Head,
        candidates: Candidates,
    ) -> None:
        self.slots = slots
        self.facts = facts
        self.head = head
        self.candidates = candidates
        self.choice = Choice.room_for(facts.max_num_tokens, facts.device)
        """Of the last step; row n is the n-th of `SegmentPlan.logits_rows`."""

    def logits(self, hidden: torch.Tensor, plan: SegmentPlan) -> Logits:
        """The step's logits.

        Args:
            hidden: [N, H], rows as `SegmentPlan.logits_rows` names them.
        """
        return Logits(
            self.head,
            hidden,
            self.facts.tile_rows,
            self.facts.mask_id,
            self._may_predict_mask(plan),
        )

    def _may_predict_mask(self, plan: SegmentPlan) -> torch.Tensor | None:
        """[N] bool; None where no row may."""
        table = self.slots
        if not any(table.host.exact[group.slots_np].any() for group in plan.groups):
            return None
        of_canvases, of_branches = [], []
        for group in plan.groups:
            # A block that ends by no schedule is filled with tokens.
            ends, keeps_masks = table.ending(group.blocks)
            may = group.blocks.requests.exact & (keeps_masks | ~ends)
            of_canvases.append(may[group.row_request])
            if group.branches is not None:
                parents = group.branches.parents
                of_branches.append(may[parents[group.branches.rows.row_request]])
        lookout = [] if plan.lookout is None else [table.exact[plan.lookout.slots] != 0]
        return torch.cat([*of_canvases, *of_branches, *lookout])

    def measure(
        self,
        logits: Logits,
        drawn: list[Drawn],
        constrained: Constrained,
        mixing: Sequence[Mixing] = (),
        scheduled: Sequence[Scheduled] = (),
        *,
        reads_best: bool = False,
    ) -> None:
        """Measure all rows of a step: `choice` holds the outcome.

        Args:
            drawn: blocks of whose rows some are drawn or restricted.
            constrained: requests that measure their rows themselves, too.
            mixing: blocks of which mixtures of all tokens are made.
            scheduled: blocks whose strategy sets the temperature; none of the others.
            reads_best: whether a strategy reads the best tokens of its rows.
        """
        for rows, values in logits.tiles():
            write_stats(
                values,
                self.choice.part(rows).measured,
                banned=logits.banned_in(rows),
                ban_id=logits.mask_id,
                shard=logits.shard,
            )
            constrained.measure(rows, values, logits, self.choice.part(rows))
            if reads_best:
                choice = self.choice.part(rows)
                choice.best.copy_(choice.candidate)
                choice.best_confidence.copy_(choice.confidence)
            for mixed_blocks, memory in mixing:
                part, own = _rows_of(mixed_blocks, rows)
                if part.start < part.stop:
                    there = slice(part.start - rows.start, part.stop - rows.start)
                    mixed = mixtures(values[there], self.head, logits.shard)
                    keep_mixtures(memory, mixed_blocks, own, mixed)
            for blocks, masked, step in drawn:
                part, _ = _rows_of(blocks, rows)
                if part.start < part.stop:
                    tile = self._tile(logits, rows, values, blocks, masked, step)
                    self.candidates.choose(tile, self.choice.part(part))
            for group in scheduled:
                part, _ = _rows_of(group.blocks, rows)
                if part.start < part.stop:
                    tile = self._tile(logits, rows, values, *group[:3])
                    choice, free = self.choice.part(part), ~constrained.has(part)
                    choose(tile, choice, group, self.candidates, self.head, free)

    def _tile(
        self,
        logits: Logits,
        rows: slice,
        values: torch.Tensor,
        blocks: BlockRows,
        masked: torch.Tensor,
        step: torch.Tensor,
    ) -> Tile:
        """The rows of some blocks among those of a tile of logits.

        Args:
            rows: of the tile; `values` are their logits.
            masked, step: as in `Drawn`.
        """
        part, own = _rows_of(blocks, rows)
        there = slice(part.start - rows.start, part.stop - rows.start)
        of_rows = masked.flatten()[blocks.row_places[own]]
        return Tile(logits, values[there], part, blocks, of_rows, step)
