# SPDX-License-Identifier: Apache-2.0
"""SegmentPlan: what one forward computes, sees and decides; and how it is made.

The scheduler has chosen each request's rows. The plan of them is made on the host:
lengths, starts and ends are known there, and what the last step decided has arrived
with its outcome (`host_slots.py`). One transfer brings the plan to the device; nothing
here waits for it, and nothing here changes a request. Where the last step is not over
yet, `guesses.py` completes the plan on the device.

What a plan says and what fills it are one idea, and stand in one file, though that has
a few lines more than others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from vllm_dlm.config.cache import FAR
from vllm_dlm.model_executor.planning.active_rows import (
    guessed_left,
    keys_of_blocks,
    parts_of_canvases,
    predicting_rows,
    rows_to_read,
    writable,
)
from vllm_dlm.model_executor.planning.block_rows import (
    BATCH_ROW,
    CANVAS_END,
    FIRST_ROW,
    HEAD_ROWS,
    LEADS,
    NOT_READ,
    NOT_READABLE,
    NOT_VALID,
    READS,
    ROWS_END,
    ROWS_START,
    SLOT,
    VOID_ROW,
    GuessedRows,
    pack,
    upload,
    upload_int32,
)
from vllm_dlm.model_executor.planning.branches import (
    BranchPlan,
    GroupRows,
    branch_blocks,
    plan_branches,
)
from vllm_dlm.model_executor.planning.lookout_rows import HostLookoutRows, LookoutRows
from vllm_dlm.model_executor.planning.segments import Segments, cut_segments, ragged

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.planning.guesses import Settled
    from vllm_dlm.model_executor.slots import RequestSlots


_NO_ROWS = np.zeros(0, dtype=np.int64)

Settle: TypeAlias = "Callable[[GroupRows], Settled]"
"""`guesses.settle`, of one group."""


@dataclass(frozen=True)
class SegmentPlan:
    """One forward: its segments, and the active blocks that it decides.

    Of the batch's requests, some decide in this forward; the others compute a part of
    their prompt.
    """

    segments: Segments
    kv_lens_np: np.ndarray
    """[S] int64: keys each segment attends to. With full attention they may reach
    beyond the rows of this forward."""
    causal_np: np.ndarray | None
    """[S] bool: where a position sees none to its right, as finished text does with
    causal attention; None with another kind of attention."""
    row_slots: torch.Tensor
    """[M] int32: state slot of each row's request."""
    row_drafts: torch.Tensor | None
    """[M] int64: 1 where drafts stand in the place of masks, to be verified; None where
    they do nowhere."""
    logits_rows: torch.Tensor
    """[N] int32: rows of the forward that go through lm_head, group by group: those of
    the blocks' masks, or of all their positions where the strategy reads them. Behind
    them those of branches, group by group; and last those of the lookout."""
    groups: list[GroupRows]
    """The blocks that are decided, by what decides them (`HostSlots.group`)."""
    branches: BranchPlan | None
    """Drafts that are evaluated along; None where there are none."""
    lookout: LookoutRows | None
    """Rows read right of active blocks; None where there are none."""
    canvas_rows: torch.Tensor | None
    """[n] int32: `BlockRows.canvas_rows` of all groups, one behind the other."""
    guessed_left: tuple[torch.Tensor, torch.Tensor] | None
    """With causal attention, [n] int64 and [n] int32: segments of which only the device
    knows whether they are left of the active block, and causal; and whether they are.
    None where there are none."""


def plan_forward(
    slots: RequestSlots,
    facts: EngineFacts,
    batch: InputBatch,
    page_size: int,
    settle: Settle,
) -> SegmentPlan:
    """Plan the forward of a batch.

    Args:
        batch: the rows that vLLM has scheduled.
        page_size: tokens in a KV page.
        settle: completes the plan of a group that has requests that run ahead.
    """
    host, slots_in_batch = slots.host, batch.idx_mapping_np
    runs_ahead = host.runs_ahead[slots_in_batch]
    host.settle(slots_in_batch[~runs_ahead])
    starts = batch.num_computed_tokens_np.astype(np.int64)
    branches = np.ones_like(starts)
    if batch.num_draft_tokens_per_req is not None:
        # What vLLM takes for a number of draft tokens (`scheduler.py`).
        branches += batch.num_draft_tokens_per_req
    ends = starts + batch.num_scheduled_tokens // branches
    first_blocks = host.first_block[slots_in_batch]
    # Until its first block is reached, a request's rows are a part of its prompt.
    decides = (ends > first_blocks) | (
        host.leads[slots_in_batch] & (ends == first_blocks)
    )
    if slots.pins is not None:
        decides &= ~parts_of_canvases(
            host, slots_in_batch, ends, facts.defaults.leads_blocks
        )
    if facts.commits_alone:
        decides &= runs_ahead | (ends > host.block_start[slots_in_batch])
    segments = cut_segments(
        facts.defaults.attention,
        starts,
        ends,
        # A draft, and what verifies it, are one segment.
        np.where(host.verifies, FAR, host.attended_length)[slots_in_batch],
        host.origin[slots_in_batch],
        first_blocks,
    )
    segments = segments.repeated(branches)
    deciding = decides.nonzero()[0]
    groups = host.group[slots_in_batch[deciding]]
    planner = _Planner(slots, facts, batch, starts, ends, settle)
    for number in np.unique(groups):
        planner.add_group(deciding[groups == number])
    kv_lens, causal = planner.keys(segments)
    row_slots = np.repeat(slots_in_batch, batch.num_scheduled_tokens)
    looked_at = planner.lookout
    sent = upload_int32(
        facts.device,
        row_slots,
        np.concatenate([*planner.logits_rows, looked_at.rows]),
        looked_at.slots,
        looked_at.positions,
        np.concatenate(planner.canvas_rows or [_NO_ROWS]),
        *planner.packed,
    )
    canvas_rows = sent[4] if facts.soft_inputs else None
    blocks = planner.block_rows(sent[5:], canvas_rows)
    logits_rows, branch_plan = sent[1], None
    if branches.max() > 1:
        branch_plan = plan_branches(
            starts, ends, branches, segments, kv_lens, page_size, facts.device
        )
        blocks, rows = planner.with_branches(blocks, branches)
        (logits_rows,) = upload_int32(
            facts.device, np.concatenate([rows, looked_at.rows])
        )
    blocks = [planner.settled(rows, logits_rows) for rows in blocks]
    return SegmentPlan(
        segments=segments,
        kv_lens_np=kv_lens,
        causal_np=causal,
        row_slots=sent[0],
        row_drafts=planner.row_drafts(),
        logits_rows=logits_rows,
        groups=blocks,
        branches=branch_plan,
        lookout=LookoutRows(sent[2], sent[3]) if len(looked_at.rows) else None,
        canvas_rows=canvas_rows,
        guessed_left=guessed_left(facts, segments, blocks),
    )


class _Planner:
    """Plans the active blocks of a batch, group by group.

    Args:
        starts, ends: [start, end) of the rows of each request of the batch.
    """

    def __init__(
        self,
        slots: RequestSlots,
        facts: EngineFacts,
        batch: InputBatch,
        starts: np.ndarray,
        ends: np.ndarray,
        settle: Settle,
    ) -> None:
        self._slots = slots
        self._settle = settle
        self._facts = facts
        self._batch = batch
        self._starts = starts
        self._ends = ends
        self._seen = np.zeros(len(starts), dtype=np.int64)
        """[requests of the batch]: how far the last segment of each sees."""
        self._parts: list[dict[str, Any]] = []
        """Of each group: fields of `GroupRows`."""
        self.packed: list[np.ndarray] = []
        """Of each group: see `pack`."""
        self.logits_rows: list[np.ndarray] = []
        """Of each group: its rows of the forward."""
        self.canvas_rows: list[np.ndarray] = []
        """Of each group: see `BlockRows`; none in engines without soft inputs."""
        self.lookout = HostLookoutRows.none()

    def add_group(self, deciding: np.ndarray) -> None:
        """Plan the blocks of some requests [R] of the batch, of one group."""
        batch, host, defaults = self._batch, self._slots.host, self._facts.defaults
        runs_ahead = host.runs_ahead[batch.idx_mapping_np[deciding]]
        if runs_ahead.any():
            # The others first, so that the rows of these follow each other.
            order = np.argsort(runs_ahead, kind="stable")
            deciding, runs_ahead = deciding[order], runs_ahead[order]
        slots_np = batch.idx_mapping_np[deciding].astype(np.int64)
        start, end = self._starts[deciding, None], self._ends[deciding, None]
        block_start = host.block_start[slots_np]
        canvas_end = self._canvas_ends(slots_np, end[:, 0])
        # Rows that end before the block predict its first position; those that verify
        # drafts predict all.
        verifies = host.verifies[slots_np] & (host.step[slots_np] > 0)
        leads = (end[:, 0] <= block_start) | verifies

        width = int(host.window[slots_np[0]])
        positions = block_start[:, None] + np.arange(width)
        valid = positions < canvas_end[:, None]
        source = predicting_rows(host, defaults, slots_np, positions, start, leads)
        readable = valid & (start <= source) & (source < end)
        readable &= writable(host, slots_np, valid)
        is_read = readable & rows_to_read(host, slots_np, valid)
        # What the host has of these is not so any more: a row for each position.
        is_read[runs_ahead] = True
        row_request, row_offset = is_read.nonzero()
        first_row = sum(map(len, self.logits_rows))
        row_at = np.where(readable, NOT_READ, np.where(valid, NOT_READABLE, NOT_VALID))
        row_at[is_read] = first_row + np.arange(len(row_request))
        first_rows = batch.query_start_loc_np[deciding].astype(np.int64) - start[:, 0]
        if defaults.reuses_blocks:
            block_end = block_start + host.block_length[slots_np]
            block_end = np.minimum(block_end, canvas_end)
            # A draft sees itself whole.
            block_end = np.where(host.verifies[slots_np], end[:, 0], block_end)
            # Who runs ahead computes the whole block.
            self._seen[deciding] = np.where(leads | runs_ahead, 0, block_end)
        head_rows = np.zeros(len(slots_np), dtype=np.int64)
        head_rows[0] = (~runs_ahead[row_request]).sum()
        self._parts.append(
            {
                "slots_np": slots_np,
                "batch_rows_np": deciding,
                "width": width,
                "row_at_np": row_at,
                "first_row": first_row,
                "row_request_np": row_request,
                "row_offset_np": row_offset,
            }
        )
        self.logits_rows.append((first_rows[:, None] + source)[is_read])
        if self._facts.soft_inputs:
            own_end = np.minimum(block_start + width, canvas_end)
            begin = np.where(runs_ahead, 0, block_start)
            rows_end = np.where(runs_ahead, end[:, 0], np.minimum(end[:, 0], own_end))
            begin = np.maximum(begin, start[:, 0])
            owner, nth = ragged(np.maximum(rows_end - begin, 0))
            self.canvas_rows.append((first_rows + begin)[owner] + nth)
        if (is_looking := host.looking_out(slots_np)).any():
            looking = is_looking.nonzero()[0]
            self.lookout += HostLookoutRows.of(
                slots_np[looking],
                starts=np.maximum(start[looking, 0], block_start[looking] + width),
                ends=np.minimum(end[looking, 0], canvas_end[looking] - defaults.shift),
                first_rows=first_rows[looking],
                shift=defaults.shift,
            )
        columns = {
            SLOT: slots_np,
            BATCH_ROW: deciding,
            CANVAS_END: canvas_end,
            ROWS_END: (self._starts + batch.num_scheduled_tokens)[deciding],
            LEADS: leads,
            HEAD_ROWS: head_rows,
            ROWS_START: start[:, 0],
            FIRST_ROW: batch.query_start_loc_np[deciding],
            READS: runs_ahead * (1 + host.reads[slots_np]),
            VOID_ROW: np.full(len(slots_np), batch.num_reqs),
        }
        self.packed.append(pack(columns, row_at, self._slots.num_slots, batch.num_reqs))

    def row_drafts(self) -> torch.Tensor | None:
        """See `SegmentPlan`."""
        host, slots_np = self._slots.host, self._batch.idx_mapping_np
        verifies = host.verifies[slots_np] & (host.step[slots_np] > 0)
        if not verifies.any():
            return None
        rows = np.repeat(verifies, self._batch.num_scheduled_tokens)
        return upload(self._facts.device, rows)[0]

    def keys(self, segments: Segments) -> tuple[np.ndarray, np.ndarray | None]:
        """[S]: keys that segments see; and which are causal, where some may be."""
        host, defaults = self._slots.host, self._facts.defaults
        if defaults.reuses_blocks:
            kv_lens, is_left = keys_of_blocks(segments, self._seen)
            return kv_lens, is_left if defaults.attention == "causal" else None
        slots_np = self._batch.idx_mapping_np
        computed = host.note_computed(slots_np, self._ends)
        seen = np.minimum(computed, self._canvas_ends(slots_np, self._ends))
        return seen[segments.request], None

    def _canvas_ends(self, slots_np: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """[R]: where the canvases end in this forward.

        Args:
            ends: [R]: one past the last position computed for each request.
        """
        host, defaults = self._slots.host, self._facts.defaults
        canvas_end = host.canvas_end[slots_np]
        is_over = canvas_end <= host.block_start[slots_np]
        if defaults.reuses_blocks:
            # A strategy cut the canvas at a block's end, and the text goes on.
            return np.where(is_over, host.text_end[slots_np], canvas_end)
        # A canvas's first forward covers it, as wide as the scheduler has opened it.
        opened = np.where(is_over, ends, canvas_end)
        for number in (is_over & host.prunes[slots_np]).nonzero()[0]:
            # Or a part of it: then it is as wide as canvases are.
            slot = int(slots_np[number])
            layout = self._slots.requests[slot].layout
            opened[number] = layout.canvas_from(int(host.block_start[slot]))
        return opened

    def block_rows(
        self, packed: list[torch.Tensor], canvas_rows: torch.Tensor | None
    ) -> list[GroupRows]:
        """The groups' blocks.

        Args:
            packed: `self.packed` on the device.
            canvas_rows: [n] int32: `self.canvas_rows` there; None where there are none.
        """
        counts = [len(rows) for rows in self.canvas_rows]
        own = [None] * len(packed) if canvas_rows is None else canvas_rows.split(counts)
        return [
            GroupRows(
                **part,
                packed_np=there_np,
                packed=there,
                table=self._slots,
                canvas_rows=rows,
            )
            for part, there_np, there, rows in zip(
                self._parts, self.packed, packed, own, strict=True
            )
        ]

    def settled(self, rows: GroupRows, logits_rows: torch.Tensor) -> GroupRows:
        """The rows of a group, completed where requests run ahead.

        Args:
            logits_rows: [N] int32: rows of logits on the device, of all groups;
                completed in place.
        """
        last = len(rows.slots_np)
        count = int(self._slots.host.runs_ahead[rows.slots_np].sum())
        if count == 0:
            return rows
        found = self._settle(rows)
        own, end = slice(last - count, last), rows.first_row + rows.num_rows
        logits_rows[end - count * rows.width : end] = found.rows[own].flatten()
        return replace(
            rows,
            packed=found.packed,
            guessed=GuessedRows(
                rows.batch_rows_np[own],
                rows.packed[own, BATCH_ROW].long(),
                count * rows.width,
                found.in_vain[own],
                found.is_left[own],
            ),
        )

    def with_branches(
        self, groups: list[GroupRows], branches: np.ndarray
    ) -> tuple[list[GroupRows], np.ndarray]:
        """The groups, those that have branches with them; and [N] all rows of logits.

        Args:
            branches: of each request of the batch, number 0 included.
        """
        lengths, rows, blocks = self._ends - self._starts, [*self.logits_rows], []
        for group, own_rows in zip(groups, self.logits_rows, strict=True):
            counts = branches[group.batch_rows_np]
            if counts.max() > 1:
                drafted = branch_blocks(
                    group,
                    own_rows,
                    counts,
                    lengths[group.batch_rows_np],
                    sum(map(len, rows)),
                )
                rows.append(drafted.logits_rows_np)
                group = replace(group, branches=drafted)
            blocks.append(group)
        return blocks, np.concatenate(rows)
