# SPDX-License-Identifier: Apache-2.0
"""From the rows that the scheduler chose to a `SegmentPlan`.

Everything is laid out on the host: lengths, starts and ends are known there, and what
the last step decided has arrived with its outcome (`host_slots.py`). One transfer
brings the plan to the device; nothing here waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_dlm.model_executor.host_slots import BLOCK, OPEN_MASKS
from vllm_dlm.model_executor.planning.block_rows import BlockRows, Cells, upload_named
from vllm_dlm.model_executor.planning.branches import BranchPlan, plan_branches
from vllm_dlm.model_executor.planning.segments import Segments, cut_segments

if TYPE_CHECKING:
    from vllm_dlm.model_executor.state import DlmModelState


@dataclass(frozen=True)
class SegmentPlan(BlockRows):
    """One forward: its segments, and the active blocks that it decides.

    Of the batch's requests, R decide in this forward; the others compute a part of
    their prompt.
    """

    segments: Segments
    kv_lens: torch.Tensor
    """[S] int32: keys each segment attends to; those of class A may reach beyond the
    rows of this forward."""
    causal: torch.Tensor | None
    """[S] int32: 1 where a position sees none to its right, as in class C's finished
    text; None where there is no such segment."""
    batch_rows_np: np.ndarray
    """[R]: index of each deciding request in vLLM's batch."""
    ends: torch.Tensor
    """[R] int64: one past the last position computed for each."""
    canvas_end: torch.Tensor
    """[R] int64: one past each canvas' last position."""
    cells: Cells
    """Where the canvases' positions are kept."""
    seeds: torch.Tensor
    """[R] bool: the rows end before the block, and predict its first position alone."""
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


def plan_forward(state: DlmModelState, input_batch: Any, page_size: int) -> SegmentPlan:
    """Plan the forward of vLLM's `input_batch`; updates the canvas ends.

    Args:
        page_size: tokens in a KV page.
    """
    state.host.settle()
    starts = input_batch.num_computed_tokens_np.astype(np.int64)
    branches = np.ones_like(starts)
    if input_batch.num_draft_tokens_per_req is not None:
        # What vLLM takes for a number of draft tokens (`scheduler.py`).
        branches += input_batch.num_draft_tokens_per_req
    ends = starts + input_batch.num_scheduled_tokens // branches
    host, slots = state.host, input_batch.idx_mapping_np
    first_blocks = host.first_block[slots]
    # Until its first block is reached, a request's rows are a part of its prompt.
    decides = (ends > first_blocks) | (host.seeds[slots] & (ends == first_blocks))
    if state.commits_alone:
        decides &= ends > host.block_start[slots]
    segments = cut_segments(
        state.defaults.model_class,
        starts,
        ends,
        host.block_length[slots],
        host.origin[slots],
        first_blocks,
    )
    # A request with branches computes its active block, or all: one segment.
    segments = segments.repeated(branches[segments.request])
    rows = decides.nonzero()[0]
    plan = _plan_blocks(state, input_batch, segments, rows, starts, ends)
    if branches.max() == 1:
        return plan
    return replace(
        plan,
        branches=plan_branches(starts, ends, branches, segments, rows, plan, page_size),
    )


def _plan_blocks(
    state: DlmModelState,
    input_batch: Any,
    segments: Segments,
    rows: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
) -> SegmentPlan:
    """The active blocks of the batch's `rows`, and where their logits come from."""
    host, defaults = state.host, state.defaults
    slots = input_batch.idx_mapping_np[rows].astype(np.int64)
    start, end = starts[rows, None], ends[rows, None]
    block_start, canvas_end = host.block_start[slots], host.canvas_end[slots]
    kv_lens = segments.kv_lens
    if defaults.reuses_blocks:
        # A strategy cut the canvas at a block's end, and the text goes on.
        goes_on = canvas_end <= block_start
        canvas_end = np.where(goes_on, host.text_end[slots], canvas_end)
    else:
        # A canvas' first forward covers it, as wide as the scheduler has opened it.
        canvas_end = np.where(canvas_end <= block_start, end[:, 0], canvas_end)
        seen = np.minimum(end[:, 0] + host.keys_behind[slots], canvas_end)
        kv_lens = seen[segments.request]
    host.canvas_end[slots] = canvas_end

    # Rows that end before the block predict its first position.
    seeds = end[:, 0] <= block_start
    is_causal = None
    if defaults.reuses_blocks:
        # The active block is its request's last segment, and sees itself whole, also
        # where a sub-block of it is computed.
        block_end = np.zeros(len(starts), dtype=kv_lens.dtype)
        block_end[rows] = np.where(
            seeds, 0, np.minimum(block_start + host.block_length[slots], canvas_end)
        )
        block_end = np.where(segments.is_last, block_end[segments.request], 0)
        kv_lens = np.maximum(kv_lens, block_end)
        if defaults.model_class == "C":
            is_causal = block_end == 0

    # B of the batch is the longest request's.
    lengths = host.block_length[slots, None]
    offsets = np.arange(lengths.max(initial=1))
    positions = block_start[:, None] + offsets
    valid = (positions < canvas_end[:, None]) & (offsets < lengths)
    source = positions - np.where(seeds, 1, defaults.shift)[:, None]
    # After an opening or a seed no row left of the block is computed: a first token
    # that is still missing is predicted by its own row.
    is_over = ~seeds if defaults.seeds_blocks else host.opens_alone[slots]
    is_own = is_over[:, None] & host.masked[slots, : len(offsets)]
    source = np.where(is_own & (source < start), positions, source)
    readable = valid & (start <= source) & (source < end)
    is_read = readable & _rows_to_read(state, slots, valid)
    row_request_np, row_offset_np = is_read.nonzero()
    row_at = np.full(positions.shape, -1)
    row_at[is_read] = np.arange(len(row_request_np))
    first_rows = input_batch.query_start_loc_np[rows].astype(np.int64) - start[:, 0]
    logits_rows = (first_rows[:, None] + source)[is_read]
    there = upload_named(
        state.device,
        {
            "slots": slots,
            "ends": end[:, 0],
            "rows_ends": (starts + input_batch.num_scheduled_tokens)[rows],
            "canvas_end": canvas_end,
            "seeds": seeds,
            "positions": positions,
            "valid": valid,
            "readable": readable,
            "row_at": row_at,
            "logits_rows": logits_rows,
            "row_places": row_request_np * len(offsets) + row_offset_np,
            "row_request": row_request_np,
            "kv_lens": kv_lens,
            "places": valid.ravel().nonzero()[0],
            "cells": (slots[:, None] * state.max_model_len + positions)[valid],
            **({} if is_causal is None else {"causal": is_causal}),
        },
    )
    plan = SegmentPlan(
        segments=segments,
        slots_np=slots,
        batch_rows_np=rows,
        row_request_np=row_request_np,
        row_offset_np=row_offset_np,
        kv_lens=there.pop("kv_lens").int(),
        causal=None if is_causal is None else there.pop("causal").int(),
        cells=Cells(there.pop("places"), there.pop("cells")),
        branches=None,
        **there,
    )
    state.canvas_end[plan.slots] = plan.canvas_end
    return plan


def _rows_to_read(
    state: DlmModelState, slots: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    """[R, B] bool: positions of the active blocks whose logits are read.

    The device's own masks are `Views.masked`, the open ones of them `Views._open`.
    """
    width, reads = valid.shape[1], state.host.reads[slots, None]
    masked = state.host.masked[slots, :width] & valid
    sub_block = np.arange(width) // state.host.sub_block_length[slots, None]
    first = np.where(masked, sub_block, width).min(axis=1, keepdims=True)
    masked &= (sub_block == first) | (reads != OPEN_MASKS)
    is_read: np.ndarray = masked | (reads == BLOCK)
    return is_read
