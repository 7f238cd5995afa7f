# SPDX-License-Identifier: Apache-2.0
"""What one step of a full-attention model computes, sees and predicts, by KV policy.

`none`, and Fast-dLLM's `prefix` and `dual` (arXiv 2505.22618); `vicinity`, dInfer's
refresh of a block's surroundings (2510.08666); `window`, Window-Diffusion's plan
(2601.20332). Positions, not rows: the row that predicts position p is p - shift.
"""

from __future__ import annotations

from typing import NamedTuple

from reference.layers import KVStore

CACHES = ("none", "prefix", "dual")
MOVING_CACHES = ("vicinity", "window")
"""Those that compute other positions than the block's, or not all of these."""
ALL_CACHES = (*CACHES, *MOVING_CACHES)

USUAL = {
    "vicinity": {"look_back": 16, "look_ahead": 16, "warmup_steps": 4},
    "window": {"active_window": 16, "external_window": 64, "refresh_every": 32},
}


class Span(NamedTuple):
    """Of one forward; positions count from 0."""

    first_row: int
    end_row: int
    """One past the last row computed."""
    low: int
    """First position predicted."""
    high: int
    """One past the last position predicted."""
    seen: int
    """Keys that are attended to: those of the positions 0 to seen - 1."""
    refresh: bool = False
    """All that is seen is computed."""
    writable: int = 1 << 30
    """One past the last position of the block that may be written."""


def step_span(
    cache: str,
    options: dict[str, int],
    *,
    step: int,
    is_first_block: bool,
    start: int,
    end: int,
    length: int,
    masks: list[int],
    phase: int,
    computed: int,
    always: bool,
    whole_block: bool,
    shift: int,
) -> Span:
    """The span of a block's step.

    Args:
        options: of `vicinity` and `window`; what is missing is as in `USUAL`.
        step: of the block, from 0, which computes everything.
        start, end: the block.
        length: of prompt and canvas.
        masks: masked positions from the block's start on.
        phase: the leftmost mask before the last refresh.
        computed: one past the last position computed in this block so far.
        always: of `window`: this step is a refresh, whatever its number.
        whole_block: `window` must compute the block, as the rule reads all of it.
    """
    everything = Span(0, length, 0, length, length, refresh=True)
    options = USUAL.get(cache, {}) | options
    if cache == "none" or (step == 0 and cache != "window"):
        return everything
    if cache == "prefix":
        return _rows(start - shift, length, length, length, shift)
    if cache == "dual":
        return _rows(start - shift, end, length, length, shift)
    if cache == "vicinity":
        if is_first_block and step <= options["warmup_steps"]:
            return everything
        first = start - max(options["look_back"], shift)
        stop = min(end + options["look_ahead"], length)
        return _rows(first, stop, length, length, shift)
    active, external = options["active_window"], options["external_window"]

    def up_to_mask(number: int) -> int:
        # Positions right of the canvas's last mask are seen where masks are too few.
        return masks[number - 1] + 1 if number <= len(masks) else length

    refresh = always or step % options["refresh_every"] == 0
    first = 0 if refresh else phase - shift
    stop = up_to_mask(external if refresh else min(active, max(len(masks), 1)))
    writable = up_to_mask(active)
    if whole_block:
        first = 0 if refresh else start - shift
        stop = min(end + external - active, length) if refresh else end
        writable = end
    span = _rows(first, stop, max(stop, computed), length, shift)
    return span._replace(refresh=refresh, writable=writable)


def _rows(first: int, end: int, seen: int, length: int, shift: int) -> Span:
    # Position 0 has no row to its left: its own says what is there.
    low = first + shift if first > 0 else 0
    return Span(max(first, 0), end, low, min(end + shift, length), seen)


def leading(store: KVStore | None, count: int) -> KVStore | None:
    """The store's first positions, not a copy: what is written there stays."""
    if store is None:
        return None
    return KVStore(
        [keys[:count] for keys in store.keys],
        [values[:count] for values in store.values],
    )
