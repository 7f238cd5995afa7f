# SPDX-License-Identifier: Apache-2.0
"""Elastic: columns by slot of requests whose hole widens and narrows (DreamOn).

They are there while some such request is, and no compiled step knows of them, as of
pins. What moves in a step, and where it goes, is `sampling/moving.py`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_dlm.model_executor.columns import NO_TOKEN
from vllm_dlm.model_executor.planning.block_rows import upload

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm_dlm.model_executor.layout import RequestLayout
    from vllm_dlm.model_executor.planning.block_rows import Blocks


class Elastic:
    """Columns by slot; 0, and no token, for requests with another canvas or none.

    Args:
        num_slots: requests that there can be at a time.
        device: the engine's.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.budget = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        """[slots + 1] int64: how often the hole may widen yet."""
        self.hidden = torch.zeros_like(self.budget)
        """[slots + 1] int64: positions at the canvas's end that are not handed out."""
        self._closing = self.budget.new_full((num_slots + 1, 1), NO_TOKEN)
        """[slots + 1, K] int64: tokens that take their position away."""
        self._slots: set[int] = set()

    def admit(
        self, slot: int, layout: RequestLayout, closing_ids: Iterable[int]
    ) -> None:
        """Take over a new request, or one that begins anew after a preemption.

        Args:
            closing_ids: tokens that fill no hole: they end a text, or pad it.
        """
        canvas, ids = layout.canvas, np.array(sorted(closing_ids), dtype=np.int64)
        assert canvas is not None
        self._slots.add(slot)
        self.budget[slot] = canvas.most_widenings
        self.hidden[slot] = canvas.hidden
        missing = len(ids) - self._closing.shape[1]
        if missing > 0:
            more = self._closing.new_full((len(self._closing), missing), NO_TOKEN)
            self._closing = torch.cat([self._closing, more], dim=1)
        self._closing[slot] = NO_TOKEN
        (self._closing[slot, : len(ids)],) = upload(self._closing.device, ids)

    def forget(self, slot: int) -> bool:
        """Forget a request, if it is one of these; whether any is left."""
        if slot in self._slots:
            self._slots.remove(slot)
            self.budget[slot] = self.hidden[slot] = 0
            self._closing[slot] = NO_TOKEN
        return bool(self._slots)

    def closes(self, tokens: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """[R, B] bool: which tokens [R, B] take their position away."""
        return (tokens[:, :, None] == self._closing[slots][:, None, :]).any(dim=2)

    def room(self, blocks: Blocks) -> torch.Tensor:
        """[R] int64: positions that the holes may gain."""
        return blocks.requests.text_end - blocks.canvas_end

    def cannot_widen(self, blocks: Blocks) -> torch.Tensor:
        """[R] bool: holes that are as long as may be, or have widened too often."""
        return (self.room(blocks) <= 0) | (self.budget[blocks.slots] <= 0)
