# SPDX-License-Identifier: Apache-2.0
"""Particles: texts that grow side by side, and the better ones are copied.

Sequential Monte Carlo over steps or blocks. Without a scorer a text's weight is its own
probability (self-rewarding SMC, arXiv 2602.01849); with one, how much its score rose.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, Self

from pydantic import Field, model_validator

from vllm_dlm.search.base import Extend, Score, Search, Task, Text, ranked
from vllm_dlm.search.best_of_n import check_draws
from vllm_dlm.search.stepwise import Stepwise


class Particles(Stepwise):
    """See the module docstring. The best is the likeliest text, or that of the highest
    score."""

    name = "particles"
    summary = "texts grow side by side, the better ones are copied (SMC)"
    paper = "self-rewarding SMC, arXiv 2602.01849"
    scorer: ClassVar = "optional"

    n: int = Field(default=4, ge=2, description="Particles: texts at a time.")
    beta: float = Field(
        default=1.0,
        gt=0,
        description="How much a log-probability, or a rise of the score, weighs.",
    )

    @model_validator(mode="after")
    def _draws_differ(self) -> Self:
        check_draws(self.n, self.temperature)
        return self

    def search(self, task: Task) -> Search:
        """See `Driver`."""
        step = self.step(task.kind)
        draws = random.Random(f"{self.seed}-{task.index}")
        texts = [task.start] * self.n
        scores = [0.0] * self.n
        log_weights = [0.0] * self.n
        # Scores as they were when the weights were last equal.
        bases = list(scores)
        while live := [i for i, text in enumerate(texts) if not text.finished]:
            growing = [texts[i] for i in live]
            pieces = yield Extend(
                growing,
                self.max_tokens,
                step,
                temperature=self.temperature,
                first=copies(growing),
            )
            for i, (piece,) in zip(live, pieces, strict=True):
                texts[i] = task.add(texts[i], piece)
                if not task.has_scorer:
                    log_weights[i] += self.beta * math.fsum(piece.logprobs)
            if task.has_scorer:
                new = yield Score([texts[i] for i in live])
                for i, score in zip(live, new, strict=True):
                    log_weights[i] = self.beta * rise(score, bases[i])
                    scores[i] = score
            weights = normalised(log_weights)
            if effective(weights) < self.n / 2:
                chosen = resample(weights, draws.random())
                texts = [texts[i] for i in chosen]
                scores = [scores[i] for i in chosen]
                bases = list(scores)
                log_weights = [0.0] * self.n
        found: dict[Text, float] = {}
        for text, score in zip(texts, scores, strict=True):
            found.setdefault(text, score if task.has_scorer else text.logprob)
        return ranked([task.candidate(text, score) for text, score in found.items()])


def copies(texts: Sequence[Text]) -> list[int]:
    """Of each text, how many equal ones stand before it: so that each draws its own."""
    before: Counter[Text] = Counter()
    numbers = []
    for text in texts:
        numbers.append(before[text])
        before[text] += 1
    return numbers


def rise(score: float, before: float) -> float:
    """By how much a score rose; not at all from -inf to -inf."""
    return 0.0 if score == before else score - before


def normalised(log_weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1; equal ones where all are 0."""
    most = max(log_weights)
    if most == -math.inf:
        return [1 / len(log_weights)] * len(log_weights)
    weights = [1.0 if w == most else math.exp(w - most) for w in log_weights]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def effective(weights: Sequence[float]) -> float:
    """How many particles of equal weight these would be."""
    return 1 / math.fsum(weight * weight for weight in weights)


def resample(weights: Sequence[float], uniform: float) -> list[int]:
    """Systematic resampling: one draw places a comb of as many teeth as weights.

    Args:
        weights: that sum to 1.
        uniform: from 0 to 1.

    Returns:
        Indices of the particles that are gone on with.
    """
    chosen, index, sum_so_far = [], 0, weights[0]
    for tooth in range(len(weights)):
        place = (uniform + tooth) / len(weights)
        while place >= sum_so_far and index < len(weights) - 1:
            index += 1
            sum_so_far += weights[index]
        chosen.append(index)
    return chosen
