# SPDX-License-Identifier: Apache-2.0
"""HostSlots: what planning must know of each request, in host memory.

Most of it is fixed when a request is admitted. Where its active block stands, and which
of its positions are masked, is decided on the device: the sampler sends that after each
step, behind the work whose outcome the scheduler waits for in any case, so that reading
it here waits for nothing more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

OPEN_MASKS, MASKS, BLOCK = 0, 1, 2
"""Masks of the first sub-block that has any; all masks; decided positions too."""


class HostSlots:
    """Arrays by state slot.

    Args:
        slots: how many requests there can be.
        length: positions that a request can have.
    """

    def __init__(self, slots: int, length: int) -> None:
        def per_slot(dtype: Any = np.int64) -> np.ndarray:
            return np.zeros(slots, dtype=dtype)

        self.prompt_len = per_slot()
        self.block_length = per_slot()
        self.sub_block_length = per_slot()
        self.origin = per_slot()
        """Position from which blocks are counted."""
        self.first_block = per_slot()
        """Start of the block that was active when the request was (re-)admitted."""
        self.seeds = per_slot(bool)
        """Whether that block's first token comes from the rows to its left."""
        self.text_end = per_slot()
        """End of the block in which the longest text ends."""
        self.reads = per_slot()
        """Of which positions of the block the logits are read: `OPEN_MASKS`, `MASKS` or
        `BLOCK`."""
        self.predicts_end = per_slot(bool)
        """Whether the option `eotp` is on."""
        self.keys_behind = per_slot()
        """Keys that a step sees behind its rows, in class A (`cache.Reach`)."""
        self.opens_alone = per_slot(bool)
        """Whether a block's first step writes its first token alone (`opening.py`)."""
        self.block_start = per_slot()
        self.canvas_end = per_slot()
        self.masked = np.zeros((slots, length), dtype=bool)
        """Masks of the active block, by place in the block."""
        self._arriving: tuple[np.ndarray, ToHost, ToHost] | None = None

    def send(
        self,
        slots: np.ndarray,
        block_start: torch.Tensor,
        canvas_end: torch.Tensor,
        masked: torch.Tensor,
    ) -> None:
        """Take over what a step has made of some requests; it may be on its way.

        Args:
            slots: [R].
            block_start, canvas_end: [R] int64.
            masked: [R, B] bool: of the blocks that are active now.
        """
        self.settle()
        where = torch.stack([block_start, canvas_end])
        self._arriving = slots, ToHost(where), ToHost(masked)

    def settle(self) -> None:
        """Note what has been sent; before what steps change is read or set here."""
        if self._arriving is None:
            return
        (slots, where, arrived), self._arriving = self._arriving, None
        masked = arrived.numpy()
        self.block_start[slots], self.canvas_end[slots] = where.numpy()
        self.masked[slots, : masked.shape[1]] = masked


class ToHost:
    """A tensor on its way to host memory; nothing may write to it meanwhile."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._sent: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._tensor = host.copy_(tensor, non_blocking=True)
            self._sent = torch.cuda.Event()
            self._sent.record()

    def numpy(self) -> np.ndarray:
        """The tensor, once it is there."""
        if self._sent is not None:
            self._sent.synchronize()
        array: np.ndarray = self._tensor.numpy()
        return array
