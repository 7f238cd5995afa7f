# SPDX-License-Identifier: Apache-2.0
"""Best-first search over steps, as A*-decoding has it (arXiv 2505.13672).

Formulas from summaries of the paper, whose code is not public. A text costs what its
scores lost on the way; what it has still to go is how far its score is from 1.
"""

from __future__ import annotations

import heapq
from typing import ClassVar, Self

from pydantic import Field, model_validator

from vllm_dlm.search.base import (
    Candidate,
    Complete,
    Extend,
    Score,
    Search,
    Task,
    Text,
    ranked,
)
from vllm_dlm.search.best_of_n import check_draws
from vllm_dlm.search.stepwise import Stepwise

ROOT_DISTANCE = 0.5
"""Of a prompt with nothing written, which has no score."""
DIGITS = 9
"""To which sums of scores are compared: 0.1 + 0.6 and 0.2 + 0.5 are a tie."""


class BestFirst(Stepwise):
    """See the module docstring. Ties go to the longer text, then to the earlier."""

    name = "best_first"
    summary = "write steps, go on where the scores are best (A*)"
    paper = "A*-decoding, arXiv 2505.13672"
    scorer: ClassVar = "needed"

    k: int = Field(default=4, ge=1, description="Steps that are tried behind a text.")
    temperature: float = Field(default=0.8, ge=0, description="Of the draws.")
    expansions: int = Field(
        default=64,
        ge=1,
        description="Texts that are gone on from; then the best finished one counts, "
        "or the best unfinished one is completed.",
    )

    @model_validator(mode="after")
    def _draws_differ(self) -> Self:
        check_draws(self.k, self.temperature, "k")
        return self

    def search(self, task: Task) -> Search:
        """See `Driver`."""
        step = self.step(task.kind)
        frontier = Frontier()
        frontier.push(task.start, 0.0, ROOT_DISTANCE)
        seen = {task.start}
        finished: list[Candidate] = []
        for _ in range(self.expansions):
            if not frontier:
                break
            text, passed, distance = frontier.pop()
            if text.finished:
                break
            (pieces,) = yield Extend(
                [text], self.max_tokens, step, n=self.k, temperature=self.temperature
            )
            longer = [task.add(text, piece) for piece in pieces]
            new = [each for each in dict.fromkeys(longer) if each not in seen]
            if not new:
                continue
            seen.update(new)
            scores = yield Score(new)
            for each, score in zip(new, scores, strict=True):
                left = 1 - checked(score, task.index)
                frontier.push(each, passed + max(0.0, left - distance), left)
                if each.finished:
                    finished.append(task.candidate(each, score))
        else:
            if not finished and frontier:
                text, *_ = frontier.pop()
        if text.finished:
            # The first that would be gone on from: no other can cost less.
            finished.sort(key=lambda candidate: candidate.state != text)
            return [finished[0], *ranked(finished[1:])]
        if not finished:
            ((piece,),) = yield Complete([text], self.max_tokens)
            whole = task.add(text, piece)
            (score,) = yield Score([whole])
            finished.append(task.candidate(whole, checked(score, task.index)))
        return ranked(finished)


class Frontier:
    """Texts to go on from, the cheapest first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, Text, float, float]] = []
        self._pushed = 0

    def __bool__(self) -> bool:
        return bool(self._heap)

    def push(self, text: Text, passed: float, left: float) -> None:
        """Add a text.

        Args:
            passed: what its scores lost on the way.
            left: how far its score is from 1.
        """
        order = (round(passed + left, DIGITS), -len(text.written), self._pushed)
        heapq.heappush(self._heap, (*order, text, passed, left))
        self._pushed += 1

    def pop(self) -> tuple[Text, float, float]:
        """Take the cheapest text out: itself, `passed` and `left`."""
        *_, text, passed, left = heapq.heappop(self._heap)
        return text, passed, left


def checked(score: float, index: int) -> float:
    """A score that says how far a text is from a perfect one.

    Raises:
        ValueError: it is not between 0 and 1.
    """
    if not 0 <= score <= 1:
        raise ValueError(
            f"best_first takes scores from 0 to 1, and that of prompt {index} is "
            f"{score}; scale the scorer, or use best_of_n, mcts or particles"
        )
    return score
