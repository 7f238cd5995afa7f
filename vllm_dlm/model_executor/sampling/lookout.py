# SPDX-License-Identifier: Apache-2.0
"""Lookout: where texts may end, right of the active blocks.

It reads rows that the forward has computed there (`planning/lookout_rows.py`), of
requests with the option `eotp=canvas` and of those whose canvas may grow, and writes
columns of the request table for the step that follows. Predictions are the most
probable tokens, also of requests that draw theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_dlm.config.cache import FAR
from vllm_dlm.model_executor.sampling.growth import Ends, in_units

if TYPE_CHECKING:
    from vllm_dlm.model_executor.planning.lookout_rows import LookoutRows
    from vllm_dlm.model_executor.sampling.candidates import Candidates
    from vllm_dlm.model_executor.sampling.choice import Choice
    from vllm_dlm.model_executor.slots import RequestSlots


class Lookout:
    """Writes the columns `lookout_end` and `lookout_counts`, which nobody else writes.

    Args:
        slots: the request table.
        candidates: know what ends a text.
    """

    def __init__(self, slots: RequestSlots, candidates: Candidates) -> None:
        self._slots = slots
        self._candidates = candidates
        self._has_looked = False
        """Whether the columns may say something of an earlier step."""

    def look(self, rows: LookoutRows | None, choice: Choice) -> None:
        """Look at a step's rows.

        Args:
            rows: those right of the blocks, if any.
            choice: of all rows of the step, these the last ones.
        """
        table = self._slots
        if rows is not None or self._has_looked:
            table.lookout_end.fill_(FAR)
            table.lookout_counts.zero_()
        self._has_looked = rows is not None
        if rows is None:
            return
        slots, positions = rows.slots.long(), rows.positions.long()
        tokens = choice.candidate[-len(slots) :]
        confidence = choice.confidence[-len(slots) :]
        is_end = self._candidates.ends_text(tokens, slots, positions)
        sure = is_end & (confidence >= table.eotp_threshold[slots])
        first = torch.where(sure, positions, FAR)
        table.lookout_end.scatter_reduce_(0, slots, first, "amin")
        self._count(is_end, confidence, slots)

    def _count(
        self, is_end: torch.Tensor, confidence: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Count the ends; `growth.Ends` says what.

        Args:
            is_end, confidence, slots: [n]: rows, those of a request from left to right.
        """
        table, ends = self._slots, is_end.long()
        # Among all rows, those of other requests included: [n], and by request.
        before = ends.cumsum(0) - ends
        first = torch.full_like(table.lookout_end, FAR)
        first.scatter_reduce_(0, slots, before, "amin")
        count = torch.zeros_like(first).index_add_(0, slots, ends)
        from_right = (count + first)[slots] - before
        counts = is_end & (from_right <= table.growth_window[slots])
        of_rows = Ends(
            ends,
            torch.where(counts, in_units(confidence), 0),
            torch.ones_like(ends),
        )
        table.lookout_counts.index_add_(0, slots, torch.stack(of_rows, dim=1))
