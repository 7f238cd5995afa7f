# SPDX-License-Identifier: Apache-2.0
"""Best of n: draw n answers, keep the one that the scorer likes best."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from vllm_dlm.search.base import (
    Candidate,
    Complete,
    Driver,
    Kind,
    Score,
    Search,
    Task,
    ranked,
)

WAVES = 4
"""Parts in which the answers are drawn where a score can be enough."""


class BestOfN(Driver):
    """See the module docstring. Without a scorer, an answer's score is its own mean
    log-probability per token."""

    name = "best_of_n"
    summary = "draw n answers, keep the best"
    scorer: ClassVar = "optional"

    n: int = Field(default=8, ge=1, description="Answers of each prompt.")
    temperature: float = Field(default=1.0, ge=0, description="Of the draws.")
    max_tokens: int = Field(default=256, ge=1, description="Most tokens of an answer.")
    enough: float | None = Field(
        default=None,
        description="A score with which the search ends; answers are then drawn in "
        "four waves.",
    )

    @model_validator(mode="after")
    def _draws_differ(self) -> Self:
        check_draws(self.n, self.temperature)
        return self

    def check(self, kind: Kind, has_scorer: bool) -> None:
        """See `Driver`."""
        if self.enough is not None and not has_scorer:
            raise ValueError("enough is a score: give a scorer, or leave enough out")

    def search(self, task: Task) -> Search:
        """See `Driver`."""
        found: list[Candidate] = []
        wave = self.n if self.enough is None else -(-self.n // WAVES)
        while len(found) < self.n:
            count = min(wave, self.n - len(found))
            (pieces,) = yield Complete(
                [task.start],
                self.max_tokens,
                n=count,
                temperature=self.temperature,
                first=len(found),
            )
            texts = [task.add(task.start, piece) for piece in pieces]
            if task.has_scorer:
                scores = yield Score(texts)
            else:
                scores = [text.mean_logprob for text in texts]
            found += [
                task.candidate(text, score, sample=len(found) + i)
                for i, (text, score) in enumerate(zip(texts, scores, strict=True))
            ]
            if self.enough is not None and max(scores) >= self.enough:
                break
        return ranked(found)


def check_draws(n: int, temperature: float, name: str = "n") -> None:
    """Refuse several draws that would all be alike.

    Raises:
        ValueError: more than one without a temperature.
    """
    if n > 1 and temperature == 0:
        raise ValueError(
            f"{name} {n} with temperature 0 would give {n} equal texts; raise the "
            f"temperature, or set {name} to 1"
        )
