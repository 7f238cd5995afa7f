# SPDX-License-Identifier: Apache-2.0
"""Pins: which positions of canvases the requests have written themselves.

On the host, a request's `RequestLayout.canvas` says so; these are its twins on the
device, by slot. They are there while some request has brought a canvas, and no compiled
step knows of them: the steps of such requests are run as they stand (`sampler.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_dlm.config.cache import FAR
from vllm_dlm.model_executor.planning.block_rows import upload

if TYPE_CHECKING:
    from vllm_dlm.model_executor.layout import RequestLayout
    from vllm_dlm.model_executor.planning.block_rows import Blocks


class Pins:
    """Columns by slot; what has no canvas of its own is a hole everywhere.

    9 bytes x slots x positions.

    Args:
        shape: [slots + 1, positions], as the request table's.
        device: the engine's.
    """

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        slots, length = shape
        self._everywhere = torch.arange(length + 1, dtype=torch.int32, device=device)

        self.pinned = torch.zeros(shape, dtype=torch.bool, device=device)
        """[slots + 1, positions] bool: written by the request, and not to change."""
        self._before = self._everywhere.repeat(slots, 1)
        """[slots + 1, positions + 1] int32: holes left of each position, counted from
        wherever."""
        self._hole_at = self._before.clone()
        """[slots + 1, positions + 1] int32: the position of the hole before which there
        are so many; behind the last one, the canvas's end."""
        self._pins_end = torch.zeros(slots, dtype=torch.int64, device=device)
        self._handed_end = self._pins_end + FAR
        self._slots: set[int] = set()

    def admit(self, slot: int, layout: RequestLayout) -> None:
        """Take over the canvas of a new request."""
        canvas, first = layout.canvas, layout.prompt_len
        assert canvas is not None
        self._slots.add(slot)
        if canvas.is_elastic:
            # What it has written moves along: nothing of it has a place of its own.
            begun = canvas.begun
            self._handed_end[slot] = first + begun.max_tokens
            return
        device, end = self.pinned.device, first + canvas.width
        is_hole, before, hole_at = upload(
            device,
            canvas.is_hole,
            canvas.holes_before,
            first + canvas.hole_at,
        )
        self.pinned[slot] = False
        self.pinned[slot, first:end] = (is_hole == 0) & canvas.pinned
        self._before[slot, :first] = 0
        self._before[slot, first : end + 1] = before.int()
        self._before[slot, end + 1 :] = canvas.holes_before[-1]
        self._hole_at[slot] = end
        self._hole_at[slot, : len(hole_at)] = hole_at.int()
        self._pins_end[slot] = first + canvas.pins_end
        self._handed_end[slot] = first + canvas.max_tokens

    def forget(self, slot: int) -> bool:
        """Forget a request's canvas, if it has one; whether any is left."""
        if slot in self._slots:
            self._slots.remove(slot)
            self.pinned[slot] = False
            self._before[slot] = self._hole_at[slot] = self._everywhere
            self._pins_end[slot], self._handed_end[slot] = 0, FAR
        return bool(self._slots)

    def of(self, blocks: Blocks) -> torch.Tensor:
        """[R, B] bool: what is pinned in active blocks."""
        return self.pinned[blocks.slots[:, None], blocks.places]

    def is_written(self, blocks: Blocks) -> torch.Tensor:
        """[R] bool: whether a request has written the first position of its block."""
        slots, start = blocks.slots, blocks.requests.block_start
        before = self._before[slots, start].long()
        return self._hole_at[slots, before] != start

    def next_block(
        self, blocks: Blocks, block_end: torch.Tensor, canvas_end: torch.Tensor
    ) -> torch.Tensor:
        """[R] int64: start of the next block with a mask, or the canvas's end.

        Args:
            block_end: [R] int64: where the active block ends.
            canvas_end: [R] int64.
        """
        slots, length = blocks.slots, blocks.requests.block_length
        before = self._before[slots, block_end].long()
        first = torch.minimum(self._hole_at[slots, before].long(), canvas_end)
        start = block_end + (first - block_end) // length * length
        return torch.where(first == canvas_end, canvas_end, start)

    def masks_end(
        self, blocks: Blocks, block_end: torch.Tensor, number: torch.Tensor
    ) -> torch.Tensor:
        """[R] int64: one past the mask of a number [R], counted from 1 at a block's
        end, where nothing behind the block is decided."""
        before = self._before[blocks.slots, block_end].long()
        at = (before + number - 1).clamp(0, self._hole_at.shape[1] - 1)
        return self._hole_at[blocks.slots, at].long() + 1

    def masks_left(
        self, blocks: Blocks, block_end: torch.Tensor, canvas_end: torch.Tensor
    ) -> torch.Tensor:
        """[R] int64: holes from a block's end to the canvas's."""
        before = self._before[blocks.slots, block_end]
        return (self._before[blocks.slots, canvas_end] - before).long()

    def spared(self, cut: torch.Tensor, blocks: Blocks) -> torch.Tensor:
        """[R] int64: block positions of cuts; what would cut a pin off cuts nothing.

        Args:
            cut: [R] int64: the last position that is left; -1 cuts nothing.
        """
        last = self._pins_end[blocks.slots] - 1 - blocks.requests.block_start
        return torch.where(cut < last, -1, cut)

    def move_handed_end(self, slots: torch.Tensor, end: torch.Tensor) -> None:
        """Note where what is handed out ends now, of requests with an elastic hole.

        Args:
            slots, end: [n] int64.
        """
        self._handed_end[slots] = end

    def handed_end(self, slots: torch.Tensor) -> torch.Tensor:
        """[n] int64: where what is handed out ends at the latest."""
        return self._handed_end[slots]
