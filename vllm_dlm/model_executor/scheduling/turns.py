# SPDX-License-Identifier: Apache-2.0
"""Whose rows a forward computes, where the token budget does not hold those of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_dlm.model_executor.scheduling.canvas_request import CanvasRequest


class Turns:
    """Shares the token budget out, step by step.

    The running request whose last step is longest ago comes first, so a request sits
    out fewer steps in a row than requests run, or one more. `running` itself stays in
    the order of admission: vLLM takes pages from its end, that is, from the last to
    come.

    A waiting request comes behind all that run. But a request that fills a forward
    would keep it waiting for as long as that request runs, and with it all that are
    behind. So where the first that waits is the smaller one, and no forward holds both,
    it gets a turn of its own.

    Args:
        budget: rows of a forward.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._last_given = -1
        """The step in which rows were last kept free."""
        self._given_to = ""
        """Id of the request that they were kept free for."""

    def allot(
        self, running: Sequence[CanvasRequest], first: CanvasRequest | None, step: int
    ) -> None:
        """Say of each running request how many rows it may compute in this step.

        Args:
            running: their steps are planned.
            first: of the waiting requests the first, if it has a seat and pages.
            step: number of this step.
        """
        left = self._budget
        if first is not None and self._is_its_turn(running, first, step):
            start, end = first.planned_rows()
            left -= end - start
            self._last_given, self._given_to = step, first.request_id
        for request in sorted(running, key=lambda r: r.last_step):
            start = request.num_computed_tokens
            end = min(start + left, request.rows_end)
            request.allotted = request.whole_rows(start, end)
            left -= request.allotted

    def _is_its_turn(
        self, running: Sequence[CanvasRequest], first: CanvasRequest, step: int
    ) -> bool:
        """Whether a running request sits out, or computes less, for one that waits.

        It took part in the last step, all of it: if it sat that one out, there was room
        for those that wait. Who was not admitted when it could be, for some other
        reason, does not keep others waiting once more.
        """
        if not running or first.request_id == self._given_to:
            return False
        largest = max(running, key=_num_rows)
        wanted, taken = _num_rows(first), _num_rows(largest)
        return (
            wanted < taken
            and wanted + taken > self._budget
            and largest.last_step == step - 1 != self._last_given
            and first.priority <= largest.priority
        )


def _num_rows(request: CanvasRequest) -> int:
    start, end = request.planned_rows()
    return end - start
