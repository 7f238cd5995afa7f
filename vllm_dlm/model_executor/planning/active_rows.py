# SPDX-License-Identifier: Apache-2.0
"""Rows and keys of active blocks: functions of what the host knows of its requests.

`step_plan.py` puts the plan of a forward together from them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_dlm.model_executor.host_slots import BLOCK, OPEN_MASKS
from vllm_dlm.model_executor.planning.block_rows import upload

if TYPE_CHECKING:
    from vllm_dlm.config.model import ModelDefaults
    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.host_slots import HostSlots
    from vllm_dlm.model_executor.planning.branches import GroupRows
    from vllm_dlm.model_executor.planning.segments import Segments


def parts_of_canvases(
    host: HostSlots, slots_np: np.ndarray, ends: np.ndarray, leads_blocks: bool
) -> np.ndarray:
    """[R] bool: whose rows are a part of what the request has written itself.

    Such parts come between two blocks that are decided, as a prompt's before the first.

    Args:
        ends: [R]: one past the last position computed for each.
        leads_blocks: whether the model has leads.
    """
    block_start = host.block_start[slots_np]
    # Rows that end where the block begins decide its lead, if that is missing.
    lacks_lead = leads_blocks & host.masked[slots_np, 0] & (ends == block_start)
    is_later = host.has_canvas[slots_np] & (block_start > host.first_block[slots_np])
    is_part: np.ndarray = is_later & (ends <= block_start) & ~lacks_lead
    return is_part


def predicting_rows(
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


def writable(host: HostSlots, slots_np: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[R, B] bool: positions up to the last mask that the cache policy lets be written.

    Args:
        valid: [R, B] bool.
    """
    most = host.writable[slots_np, None]
    if (most >= valid.shape[1]).all():
        return valid
    masked = host.masked[slots_np, : valid.shape[1]] & valid
    is_left: np.ndarray = masked.cumsum(axis=1) <= most
    return is_left


def keys_of_blocks(
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


def rows_to_read(
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


def guessed_left(
    facts: EngineFacts, segments: Segments, groups: list[GroupRows]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """See `SegmentPlan.guessed_left`."""
    found = [rows.guessed for rows in groups if rows.guessed is not None]
    if facts.defaults.attention != "causal" or not found:
        return None
    requests = np.concatenate([rows.batch_rows_np for rows in found])
    last = np.searchsorted(segments.request, requests, side="right") - 1
    return upload(facts.device, last)[0], torch.cat([rows.is_left for rows in found])
