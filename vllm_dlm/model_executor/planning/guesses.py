# SPDX-License-Identifier: Apache-2.0
"""Blocks of requests that run ahead: what only the device knows of them.

When such a forward is planned, the step before it may still be computed, so the host
does not know which block is active and what is masked in it
(`model_executor/running_ahead.py` has the rule). The host therefore reserves a row of
logits for each position of a block, and sends which rows of the forward are the
request's. `settle` then finds on the device what those rows are for, and completes the
plan:

    rows end where the active block ends    a denoise step of this block; with `block`
                                            attention also where the next one ends
    rows end where the active block begins  its lead is decided, or nothing: KV is
                                            written for good
    any other rows                          the guess was wrong: nothing is decided

A request for which nothing is decided is made to stand for none (`block_rows.pack`), so
that whatever the step does leaves it as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_dlm.model_executor.columns import Columns, Requests
from vllm_dlm.model_executor.host_slots import BLOCK, OPEN_MASKS
from vllm_dlm.model_executor.planning.block_rows import (
    BATCH_ROW,
    CANVAS_END,
    COLUMNS,
    FIRST_ROW,
    LEADS,
    NOT_READ,
    NOT_READABLE,
    NOT_VALID,
    READS,
    ROWS_END,
    ROWS_START,
    SLOT,
    VOID_ROW,
)

if TYPE_CHECKING:
    from vllm_dlm.model_executor.facts import EngineFacts


class Settled(NamedTuple):
    """What the device has found of R blocks; of those of requests that run ahead."""

    packed: torch.Tensor
    """[R, COLUMNS + B] int32: the whole plan of a group."""
    rows: torch.Tensor
    """[R, B] int32: the row of the forward that each position's logits are read from;
    one of the request's, if the position has none."""
    in_vain: torch.Tensor
    """[R] int32: rows that vLLM shall not count as computed, if the forward is void."""
    is_left: torch.Tensor
    """[R] int32: 1 where all rows are left of the active block."""


def settle(packed: torch.Tensor, table: Columns, facts: EngineFacts) -> Settled:
    """Complete the plan of a group's R requests, where they run ahead.

    Args:
        packed: [R, COLUMNS + B] int32, as of `block_rows.pack`; of requests that run
            ahead each position has a row of logits.
        table: the request table, as the forward finds it.
    """
    defaults = facts.defaults
    columns, row_at = packed.long().split([COLUMNS, packed.shape[1] - COLUMNS], dim=1)
    column = columns.unbind(1)
    slots, start, end = column[SLOT], column[ROWS_START], column[ROWS_END]
    requests = Requests.of(table, slots)
    block_start = requests.block_start
    canvas_end = _canvas_ends(requests, end, facts)
    is_left = end <= block_start
    if defaults.reuses_blocks:
        leads = is_left & defaults.begins_with_lead(block_start, requests.prompt_len)
        block_end = torch.minimum(block_start + requests.block_length, canvas_end)
        is_void = (end != block_end) & ~leads
        if defaults.attention == "block":
            # The next block is computed along in vain, and changes nothing.
            next_end = torch.minimum(block_end + requests.block_length, canvas_end)
            is_void = is_void & ((end != next_end) | is_left)
        # Rows that end where the block begins have KV that is final now.
        in_vain = torch.where(is_left, 0, end - start)
    else:
        leads = torch.zeros_like(is_left)
        is_void, in_vain = is_left | (end != canvas_end), end - start

    offsets = torch.arange(row_at.shape[1], device=packed.device)
    positions = block_start[:, None] + offsets
    valid = (positions < canvas_end[:, None]) & ~is_void[:, None]
    masked = table.masked[slots[:, None], positions.clamp(max=table.length - 1)]
    source = positions - torch.where(leads, 1, defaults.shift)[:, None]
    if defaults.leads_blocks:
        # As in `step_plan.py`: a first token that is still missing.
        is_own = masked & ~leads[:, None] & (source < start[:, None])
        source = torch.where(is_own, positions, source)
    inside = (start[:, None] <= source) & (source < end[:, None])
    readable = valid & inside
    reads = column[READS] - 1
    is_read = readable & _rows_to_read(masked & valid, reads, requests)
    not_read = torch.where(
        valid, torch.where(readable, NOT_READ, NOT_READABLE), NOT_VALID
    )
    found = {
        SLOT: torch.where(is_void, table.num_slots, slots),
        BATCH_ROW: torch.where(is_void, column[VOID_ROW], column[BATCH_ROW]),
        CANVAS_END: canvas_end,
        LEADS: leads.long(),
    }
    completed = [found.get(number, values) for number, values in enumerate(column)]
    whole = torch.cat(
        [torch.stack(completed, dim=1), torch.where(is_read, row_at, not_read)], dim=1
    )
    row = column[FIRST_ROW][:, None] + torch.where(inside, source - start[:, None], 0)
    return Settled(
        torch.where((reads >= 0)[:, None], whole, packed).int(),
        row.int(),
        in_vain.int(),
        is_left.int(),
    )


def _canvas_ends(
    requests: Requests, end: torch.Tensor, facts: EngineFacts
) -> torch.Tensor:
    """[R] int64: where the canvases end in this forward.

    `RequestLayout.canvas_from`, where a further canvas begins.

    Args:
        end: [R] int64: one past the last position computed for each request.
    """
    canvas_end, begin = requests.canvas_end, requests.block_start
    is_over = canvas_end <= begin
    if facts.defaults.reuses_blocks:
        return torch.where(is_over, requests.text_end, canvas_end)
    length = requests.block_length
    wanted = -((begin - requests.longest) // length) * length
    widest = (facts.max_canvas // length).clamp(min=1) * length
    opened = begin + torch.minimum(wanted, widest)
    opened = opened.clamp(max=facts.max_model_len)
    canvas_end = torch.where(is_over, opened, canvas_end)
    # An admitted request's first forward says how wide its canvas is.
    return torch.where(requests.canvas_end == 0, end, canvas_end)


def _rows_to_read(
    masked: torch.Tensor, reads: torch.Tensor, requests: Requests
) -> torch.Tensor:
    """[R, B] bool: positions of the active blocks whose logits are read.

    Args:
        masked: [R, B] bool: masks of the blocks.
        reads: [R] int64: as of `HostSlots.reads`.
    """
    width = masked.shape[1]
    offsets = torch.arange(width, device=masked.device)
    sub_block = offsets // requests.sub_block_length[:, None]
    first = torch.where(masked, sub_block, width).amin(dim=1, keepdim=True)
    is_open = masked & ((sub_block == first) | (reads != OPEN_MASKS)[:, None])
    return is_open | (reads == BLOCK)[:, None]
