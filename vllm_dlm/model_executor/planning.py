# SPDX-License-Identifier: Apache-2.0
"""From the rows that the scheduler chose to a `SegmentPlan`.

Lengths, starts and ends are known on the host, so segments are cut there. Where the
active blocks stand depends on what was decided: those tensors stay on the device, and
nothing here waits for it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_dlm.model_executor.branches import plan_branches
from vllm_dlm.model_executor.segments import (
    SegmentPlan,
    Segments,
    cut_segments,
    ragged,
)

if TYPE_CHECKING:
    from vllm_dlm.model_executor.state import DlmModelState


def plan_forward(state: DlmModelState, input_batch: Any, page_size: int) -> SegmentPlan:
    """Plan the forward of vLLM's `input_batch`; updates the state's canvas ends.

    Args:
        page_size: tokens in a KV page.
    """
    starts = input_batch.num_computed_tokens_np.astype(np.int64)
    branches = np.ones_like(starts)
    if input_batch.num_draft_tokens_per_req is not None:
        # What vLLM takes for a number of draft tokens (`scheduler.py`).
        branches += input_batch.num_draft_tokens_per_req
    ends = starts + input_batch.num_scheduled_tokens // branches
    slots_cpu = input_batch.idx_mapping_np.tolist()
    requests = [state.requests[slot] for slot in slots_cpu]
    lengths = np.array([request.config.block_length for request in requests])
    first_blocks = np.array([request.first_block for request in requests])
    # Until its first block is reached, a request's rows are a part of its prompt.
    # Known here without asking the device: the scheduler cuts nothing later on.
    seeds = np.array([request.seeds for request in requests])
    decides = (ends > first_blocks) | (seeds & (ends == first_blocks))
    segments = cut_segments(
        state.defaults.model_class,
        starts,
        ends,
        lengths,
        np.array([request.origin for request in requests]),
        first_blocks,
    )
    # A request with branches computes its active block, or all: one segment.
    segments = segments.repeated(branches[segments.request])
    rows = decides.nonzero()[0]
    plan = _plan_blocks(state, input_batch, segments, rows, starts, ends, lengths[rows])
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
    lengths: np.ndarray,
) -> SegmentPlan:
    """The active blocks of the batch's `rows`, and where their logits come from.

    Args:
        lengths: [R] B of each of them; the batch's is the largest.
    """
    width = int(lengths.max(initial=1))
    owner, offset = ragged(lengths)
    places = owner * width + offset

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(state.device, non_blocking=True)

    slots_cpu = input_batch.idx_mapping_np[rows].tolist()
    slots = on_device(np.array(slots_cpu, dtype=np.int64))
    start, end = on_device(starts[rows]), on_device(ends[rows])
    block_start, canvas_end = state.block_start[slots], state.canvas_end[slots]
    kv_lens = on_device(segments.kv_lens)
    if state.defaults.reuses_blocks:
        # A strategy cut the canvas at a block's end, and the text goes on.
        goes_on = canvas_end <= block_start
        canvas_end = torch.where(goes_on, state.text_end[slots], canvas_end)
    else:
        # A forward that starts at 0 covers the canvas, as the scheduler cut it.
        canvas_end = torch.where(start == 0, end, canvas_end)
        kv_lens = canvas_end.to(torch.int32)[on_device(segments.request)]
    state.canvas_end[slots] = canvas_end

    # Rows that end before the block predict its first position.
    seeds = end <= block_start
    causal = None
    if state.defaults.model_class == "C":
        # All that is finished; the active block is its request's last segment.
        opens = torch.zeros(len(starts), dtype=torch.bool, device=state.device)
        opens[on_device(rows)] = ~seeds
        active = opens[on_device(segments.request)] & on_device(segments.is_last)
        causal = (~active).to(torch.int32)

    offsets = torch.arange(width, device=state.device)
    positions = block_start[:, None] + offsets
    valid = (positions < canvas_end[:, None]) & (
        offsets < state.block_length[slots][:, None]
    )
    shift = torch.where(seeds, 1, state.defaults.shift)
    source = positions - shift[:, None]
    readable = valid & (source < end[:, None])
    # Rows that are not there are never read; keep their index inside the request.
    source = source.clamp(start[:, None], end[:, None] - 1)
    first_rows = on_device(input_batch.query_start_loc_np[rows].astype(np.int64))
    row_places = on_device(places)
    logits_rows = ((first_rows - start)[:, None] + source).flatten()[row_places]
    return SegmentPlan(
        segments=segments,
        kv_lens=kv_lens,
        causal=causal,
        slots=slots,
        slots_cpu=slots_cpu,
        batch_rows=rows.tolist(),
        ends=end,
        seeds=seeds,
        rows_ends=on_device(
            (starts + input_batch.num_scheduled_tokens)[rows].astype(np.int64)
        ),
        positions=positions,
        valid=valid,
        readable=readable,
        logits_rows=logits_rows,
        row_places=row_places,
        row_bounds=[0, *np.cumsum(lengths).tolist()],
        branches=None,
    )
