# SPDX-License-Identifier: Apache-2.0
"""SegmentPlan: what one forward computes, sees and decides; and how it is made.

The scheduler has chosen each request's rows. The plan of them is made on the host:
lengths, starts and ends are known there, and what the last step decided has arrived
with its outcome (`host_slots.py`). One transfer brings the plan to the device; nothing
here waits for it, and nothing here changes a request.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_dlm.model_executor.host_slots import BLOCK, OPEN_MASKS
from vllm_dlm.model_executor.planning.block_rows import BlockRows, Cells, upload_named
from vllm_dlm.model_executor.planning.branches import BranchPlan, plan_branches
from vllm_dlm.model_executor.planning.segments import Segments, cut_segments

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_dlm.config.model import ModelDefaults
    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.host_slots import HostSlots
    from vllm_dlm.model_executor.slots import RequestSlots


@dataclass(frozen=True)
class SegmentPlan(BlockRows):
    """One forward: its segments, and the active blocks that it decides.

    Of the batch's requests, R decide in this forward; the others compute a part of
    their prompt.
    """

    segments: Segments
    kv_lens_np: np.ndarray
    """[S] int64: keys each segment attends to. With full attention they may reach
    beyond the rows of this forward."""
    causal_np: np.ndarray | None
    """[S] bool: where a position sees none to its right, as finished text does with
    causal attention; None with another kind of attention."""
    batch_rows_np: np.ndarray
    """[R]: index of each deciding request in vLLM's batch."""
    ends: torch.Tensor
    """[R] int64: one past the last position computed for each."""
    canvas_end: torch.Tensor
    """[R] int64: one past each canvas' last position."""
    cells: Cells
    """Where the canvases' positions are kept."""
    leads: torch.Tensor
    """[R] bool: the rows end before the block, and predict its lead, the first
    position, alone."""
    rows_ends: torch.Tensor
    """[R] int64: `ends`, and the rows of branches counted on from there."""
    branches: BranchPlan | None
    """Drafts that are evaluated along; None where there are none."""

    @property
    def has_row(self) -> torch.Tensor:
        """[R, B] bool: positions of the canvases whose logits are read."""
        return self.row_at >= 0

    def rows_at(
        self,
        requests: torch.Tensor,
        offsets: torch.Tensor,
        branch: torch.Tensor | None,
    ) -> torch.Tensor:
        """[n] int64: rows of logits of some positions, those of branches included.

        Args:
            requests: [n] int64, 0 to R - 1.
            offsets: [n] int64, places in their blocks.
            branch: [R, B] int64, of each position; None for 0.
        """
        if self.branches is None or branch is None:
            return self.row_at[requests, offsets]
        canvas = self.branches.index[requests, branch[requests, offsets]]
        return self.branches.all_rows_at[canvas, offsets]


def plan_forward(
    slots: RequestSlots, facts: EngineFacts, batch: InputBatch, page_size: int
) -> SegmentPlan:
    """Plan the forward of a batch.

    Args:
        batch: the rows that vLLM has scheduled.
        page_size: tokens in a KV page.
    """
    host, slots_in_batch = slots.host, batch.idx_mapping_np
    host.settle()
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
    if facts.commits_alone:
        decides &= ends > host.block_start[slots_in_batch]
    segments = cut_segments(
        facts.defaults.attention,
        starts,
        ends,
        host.block_length[slots_in_batch],
        host.origin[slots_in_batch],
        first_blocks,
    )
    # A request with branches computes its active block, or all: one segment.
    segments = segments.repeated(branches[segments.request])
    deciding = decides.nonzero()[0]
    plan = _plan_blocks(slots, facts, batch, segments, deciding, starts, ends)
    if branches.max() == 1:
        return plan
    return replace(
        plan,
        branches=plan_branches(
            starts, ends, branches, segments, deciding, plan, page_size
        ),
    )


def _plan_blocks(
    slots: RequestSlots,
    facts: EngineFacts,
    batch: InputBatch,
    segments: Segments,
    deciding: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
) -> SegmentPlan:
    """The active blocks of a batch, and where their logits come from.

    Args:
        deciding: [R]: the requests, of the batch, that decide.
        starts, ends: [start, end) of the rows of each request of the batch.
    """
    host, defaults = slots.host, facts.defaults
    slots_np = batch.idx_mapping_np[deciding].astype(np.int64)
    start, end = starts[deciding, None], ends[deciding, None]
    block_start = host.block_start[slots_np]
    canvas_end = _canvas_ends(host, defaults, slots_np, end[:, 0])
    # Rows that end before the block predict its first position.
    leads = end[:, 0] <= block_start

    # B of the batch is the longest request's.
    lengths = host.block_length[slots_np, None]
    offsets = np.arange(lengths.max(initial=1))
    positions = block_start[:, None] + offsets
    valid = (positions < canvas_end[:, None]) & (offsets < lengths)
    source = _predicting_rows(host, defaults, slots_np, positions, start, leads)
    readable = valid & (start <= source) & (source < end)
    is_read = readable & _rows_to_read(host, slots_np, valid)
    row_request, row_offset = is_read.nonzero()
    row_at = np.full(positions.shape, -1)
    row_at[is_read] = np.arange(len(row_request))
    first_rows = batch.query_start_loc_np[deciding].astype(np.int64) - start[:, 0]
    if defaults.reuses_blocks:
        block_end = np.minimum(block_start + lengths[:, 0], canvas_end)
        seen = np.zeros(len(starts), dtype=np.int64)
        seen[deciding] = np.where(leads, 0, block_end)
        kv_lens, is_left = _keys_of_blocks(segments, seen)
        causal = is_left if defaults.attention == "causal" else None
    else:
        seen = np.minimum(end[:, 0] + host.keys_behind[slots_np], canvas_end)
        kv_lens, causal = seen[segments.request], None

    fields = {
        "slots": slots_np,
        "ends": end[:, 0],
        "rows_ends": (starts + batch.num_scheduled_tokens)[deciding],
        "canvas_end": canvas_end,
        "leads": leads,
        "positions": positions,
        "valid": valid,
        "readable": readable,
        "row_at": row_at,
        "logits_rows": (first_rows[:, None] + source)[is_read],
        "row_places": row_request * len(offsets) + row_offset,
        "row_request": row_request,
    }
    others = {
        "places": valid.ravel().nonzero()[0],
        "cells": (slots_np[:, None] * slots.length + positions)[valid],
    }
    there = upload_named(facts.device, {**fields, **others})
    return SegmentPlan(
        **{name: there[name] for name in fields},
        segments=segments,
        slots_np=slots_np,
        batch_rows_np=deciding,
        row_request_np=row_request,
        row_offset_np=row_offset,
        kv_lens_np=kv_lens,
        causal_np=causal,
        cells=Cells(there["places"], there["cells"]),
        branches=None,
    )


def _predicting_rows(
    host: HostSlots,
    defaults: ModelDefaults,
    slots_np: np.ndarray,
    positions: np.ndarray,
    start: np.ndarray,
    leads: np.ndarray,
) -> np.ndarray:
    """[R, B]: the position whose row predicts each position of the active blocks.

    Args:
        positions: [R, B]: of the blocks.
        start: [R, 1]: first position computed for each request.
        leads: [R] bool: only the block's lead is predicted.
    """
    source = positions - np.where(leads, 1, defaults.shift)[:, None]
    # After an opening or a lead no row left of the block is computed: a first token
    # that is still missing is predicted by its own row.
    is_over = ~leads if defaults.leads_blocks else host.opens_alone[slots_np]
    is_own = is_over[:, None] & host.masked[slots_np, : positions.shape[1]]
    return np.where(is_own & (source < start), positions, source)


def _canvas_ends(
    host: HostSlots, defaults: ModelDefaults, slots_np: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """[R]: where the canvases end in this forward.

    Args:
        ends: [R]: one past the last position computed for each request.
    """
    canvas_end = host.canvas_end[slots_np]
    is_over = canvas_end <= host.block_start[slots_np]
    if defaults.reuses_blocks:
        # A strategy cut the canvas at a block's end, and the text goes on.
        return np.where(is_over, host.text_end[slots_np], canvas_end)
    # A canvas's first forward covers it, as wide as the scheduler has opened it.
    return np.where(is_over, ends, canvas_end)


def _keys_of_blocks(
    segments: Segments, block_end: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Keys that segments see where attention is by blocks, and which are left of one.

    The active block is its request's last segment, and sees itself whole, also where a
    sub-block of it is computed.

    Args:
        block_end: where the active block of each request of the batch ends; 0 where
            none of its rows is computed.

    Returns:
        [S] keys; and [S] bool: segments of prompts and of finished blocks.
    """
    of_block = np.where(segments.is_last, block_end[segments.request], 0)
    kv_lens = np.maximum(segments.kv_lens, of_block)
    return kv_lens, of_block == 0


def _rows_to_read(
    host: HostSlots, slots_np: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    """[R, B] bool: positions of the active blocks whose logits are read.

    The device's own masks are `RequestSlots.masks`; `Views._open` picks the open ones.
    """
    width, reads = valid.shape[1], host.reads[slots_np, None]
    masked = host.masked[slots_np, :width] & valid
    sub_block = np.arange(width) // host.sub_block_length[slots_np, None]
    first = np.where(masked, sub_block, width).min(axis=1, keepdims=True)
    masked &= (sub_block == first) | (reads != OPEN_MASKS)
    is_read: np.ndarray = masked | (reads == BLOCK)
    return is_read
