# SPDX-License-Identifier: Apache-2.0
"""Tokens that end requests' texts: in the table as many as it has room for, and more.

A request with many stop ids is rare; the others pay nothing for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_dlm.model_executor.columns import NO_TOKEN

if TYPE_CHECKING:
    from vllm_dlm.model_executor.slots import RequestSlots


class StopIds:
    """The stop ids of all requests; see the module docstring."""

    def __init__(self, slots: RequestSlots) -> None:
        self._slots = slots
        self._with_more: set[int] = set()
        """Slots of requests with more stop ids than the table has room for."""
        self.further: torch.Tensor | None = None
        """[slots + 1, ...] int64: their further ones; None without such requests."""

    def remove(self, slot: int) -> None:
        """Forget a request that has left."""
        self._with_more.discard(slot)
        if not self._with_more:
            self.further = None

    def add(self, slot: int, further: list[int]) -> None:
        """Keep the stop ids of a new request that the table has no room for."""
        kept = self.further
        if further:
            self._with_more.add(slot)
            if kept is None:
                kept = self._slots.stop_ids.new_empty(self._slots.num_slots + 1, 0)
            missing = (0, max(len(further) - kept.shape[1], 0))
            kept = torch.nn.functional.pad(kept, missing, value=NO_TOKEN)
            self.further = kept
        if kept is not None:
            kept[slot] = torch.tensor(padded(further, kept.shape[1]))

    def are_many(self, slots_np: np.ndarray) -> bool:
        """Whether any of these requests has more stop ids than the table has room for.

        A compiled step knows of those in the table alone.
        """
        return not self._with_more.isdisjoint(slots_np.tolist())

    def of(self, slots: torch.Tensor) -> torch.Tensor:
        """[n, ...] int64: stop ids of the requests in slots [n]."""
        stop = self._slots.stop_ids[slots]
        if self.further is None or torch.compiler.is_compiling():
            return stop
        return torch.cat([stop, self.further[slots]], dim=1)


def padded(stop_ids: list[int], length: int) -> list[int]:
    """The first so many stop ids, `NO_TOKEN` behind them."""
    return stop_ids[:length] + [NO_TOKEN] * (length - len(stop_ids))
