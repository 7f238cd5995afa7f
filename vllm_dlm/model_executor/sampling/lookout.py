# SPDX-License-Identifier: Apache-2.0
"""Lookout: where texts may end, right of the active blocks.

It reads rows that the forward has computed there (`planning/ahead.py`), of requests
with the option `eotp=canvas`, and writes a column of the request table for the step
that follows. Predictions are the most probable tokens, also of requests that draw
theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_dlm.config.cache import FAR

if TYPE_CHECKING:
    from vllm_dlm.model_executor.planning.ahead import Ahead
    from vllm_dlm.model_executor.sampling.candidates import Candidates
    from vllm_dlm.model_executor.sampling.choice import Choice
    from vllm_dlm.model_executor.slots import RequestSlots


class Lookout:
    """Writes the column `end_ahead`, which nobody else writes.

    Args:
        slots: the request table.
        candidates: know what ends a text.
    """

    def __init__(self, slots: RequestSlots, candidates: Candidates) -> None:
        self._slots = slots
        self._candidates = candidates
        self._has_looked = False
        """Whether the column may say something of an earlier step."""

    def look(self, ahead: Ahead | None, choice: Choice) -> None:
        """Look at a step's rows ahead.

        Args:
            ahead: the rows, if any.
            choice: of all rows of the step, those ahead the last ones.
        """
        table = self._slots
        if ahead is not None or self._has_looked:
            table.end_ahead.fill_(FAR)
        self._has_looked = ahead is not None
        if ahead is None:
            return
        slots, positions = ahead.slots.long(), ahead.positions.long()
        tokens = choice.candidate[-len(slots) :]
        confidence = choice.confidence[-len(slots) :]
        is_end = self._candidates.ends_text(tokens, slots, positions)
        sure = is_end & (confidence >= table.eotp_threshold[slots])
        first = torch.where(sure, positions, FAR)
        table.end_ahead.scatter_reduce_(0, slots, first, "amin")
