# SPDX-License-Identifier: Apache-2.0
"""AUP, accuracy under parallelism: one number for the trade of accuracy for speed.

A method has points: accuracy y, in percent, at rho tokens per forward. Sorted by rho,
without those whose accuracy is more than 5 points below that of the first,

    AUP = rho_1 y_1 + sum over i > 1 of
          (rho_i - rho_(i-1)) (y_i W(y_i) + y_(i-1) W(y_(i-1))) / 2
    W(y) = min(exp(-3 (1 - y / y_max)), 1)

where y_max is the best accuracy of all methods. A method that loses nothing scores its
accuracy times the tokens of a forward. Source: d3LLM, arXiv 2601.07568, as its
leaderboard computes the score (hao-ai-lab/d3LLM).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

ALPHA = 3.0
MOST_LOST = 5.0
"""Points of accuracy; what has lost more does not count."""
BASE = "static"
"""The strategy whose slowest point begins the curve of every other one."""


class Point(NamedTuple):
    """How a method does with one setting."""

    tokens_per_forward: float
    accuracy: float
    """In percent."""


class Score(NamedTuple):
    """The AUP of one method."""

    method: str
    at_once: int
    """Requests in flight."""
    points: int
    """How many count."""
    aup: float


def aup(points: Iterable[Point], best: float) -> tuple[float, int]:
    """The score of a method, and how many of its points count.

    Args:
        points: one at least.
        best: the best accuracy of all methods, in percent, over 0.
    """
    ordered = sorted(points)
    lowest = ordered[0].accuracy - MOST_LOST
    kept = [point for point in ordered if point.accuracy >= lowest]
    score = kept[0].tokens_per_forward * kept[0].accuracy
    for left, right in zip(kept, kept[1:], strict=False):
        width = right.tokens_per_forward - left.tokens_per_forward
        score += width * (_weighted(left, best) + _weighted(right, best)) / 2
    return score, len(kept)


def _weighted(point: Point, best: float) -> float:
    weight = math.exp(-ALPHA * (1 - point.accuracy / best))
    return point.accuracy * min(weight, 1.0)


def scores(cells: Sequence[Mapping[str, Any]]) -> list[Score]:
    """The score of each method of a run, the best first.

    A method is an engine, a dtype, a strategy with any parameters, a cache policy and a
    concurrency; to its points comes the slowest one of `BASE`, where that was measured
    alike: the published curves begin at one token per forward, too.

    Args:
        cells: results; those without accuracy or tokens per forward have no part.
    """
    methods: dict[tuple[Any, ...], dict[str, list[Point]]]
    methods = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        if cell.get("accuracy") is None or cell.get("tokens_per_forward") is None:
            continue
        # The cache policy with its parameters is what follows the strategy.
        cache = str(cell["setting"]).rpartition(", ")[2]
        alike = cell["engine"], cell["dtype"], cache, cell["concurrency"]
        point = Point(cell["tokens_per_forward"], 100 * cell["accuracy"])
        methods[alike][cell["strategy"]].append(point)
    everything = [
        point for of in methods.values() for points in of.values() for point in points
    ]
    best = max((point.accuracy for point in everything), default=0.0)
    if best <= 0:
        return []
    several = len({dtype for _, dtype, _, _ in methods}) > 1
    found = []
    for (engine, dtype, cache, at_once), of in methods.items():
        for strategy, points in of.items():
            base = [] if strategy == BASE else sorted(of.get(BASE, []))[:1]
            score, count = aup([*base, *points], best)
            method = f"{engine}: {strategy}, {cache}" + f", {dtype}" * several
            found.append(Score(method, int(at_once), count, score))
    return sorted(found, key=lambda score: -score.aup)
