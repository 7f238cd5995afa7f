# SPDX-License-Identifier: Apache-2.0
"""Decoding rules that remember, of one request, in plain loops.

BACD (TDAR, arXiv 2602.09555), KLASS (2511.05664), credit decoding (2510.06133) and
SlowFast sampling (2506.10848). Every strategy is compared with these step by step.

Each rule is a class: an object remembers one block, and `decide` is a step of it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from reference.rules import Rule, View, float32, top_k

KEPT = 64
"""Tokens whose probabilities `Klass` remembers."""


class Memory(Protocol):
    """What a rule knows of one block."""

    def decide(self, view: View) -> dict[int, int]:
        """Block offsets to commit, and the token of each."""


def remembering(begin: Callable[[], Memory]) -> Rule:
    """A rule that begins anew with each block.

    Asked again about the same forward, it answers from what it knew before: the tests
    ask what a slightly different view would have led to.
    """
    block = forward = -1
    before = after = begin()

    def select(view: View) -> dict[int, int]:
        nonlocal block, forward, before, after
        is_new = view.forward != forward
        if is_new:
            before = after if view.first == block else begin()
            block, forward = view.first, view.forward
        memory = copy.deepcopy(before)
        chosen = memory.decide(view)
        if is_new:
            after = memory
        return chosen

    return Rule(select)


def argmaxes(view: View, offsets: list[int]) -> dict[int, int]:
    return {i: int(view.argmax[i]) for i in sorted(offsets)}


@dataclass
class Bacd:
    """TDAR: as sure as the mean of what was written, within bounds."""

    lowest: float = 0.6
    highest: float = 0.9
    written: list[float] = field(default_factory=list)

    def decide(self, view: View) -> dict[int, int]:
        candidates = view.masked_offsets()
        c = [float(value) for value in view.confidence]
        if not candidates:
            return {}
        if self.written:
            tau = sum(self.written) / len(self.written)
        else:
            tau = max(c[i] for i in candidates)
        tau = min(max(tau, float(float32(self.lowest))), float(float32(self.highest)))
        chosen = [i for i in candidates if c[i] >= tau]
        chosen = chosen or top_k(view.confidence, candidates, 1)
        self.written += [c[i] for i in chosen]
        return argmaxes(view, chosen)


@dataclass
class Klass:
    """KLASS: sure tokens whose distribution has moved little for some steps.

    Else the scheduled number of the best. Of the last distribution it knows the `KEPT`
    most probable tokens; the others are one. It looks at positions that may be written:
    in sub-blocks, a position's steps are those of its own.
    """

    threshold: float = 0.9
    kl_threshold: float = 0.01
    history: int = 2
    last: dict[int, list[float]] = field(default_factory=dict)
    moved: dict[int, list[float]] = field(default_factory=dict)
    """Per position: the divergences so far."""

    def decide(self, view: View) -> dict[int, int]:
        candidates = view.masked_offsets()
        now = {i: view.probabilities[i].double().tolist() for i in candidates}
        for i in candidates:
            moved = self.moved.setdefault(i, [])
            if i in self.last:
                moved.append(divergence(now[i], self.last[i]))
        self.last = now
        ready = []
        for i in candidates:
            recent = self.moved[i][-self.history :]
            rested = len(recent) == self.history and all(
                kl < float(float32(self.kl_threshold)) for kl in recent
            )
            if rested and view.confidence[i] > float32(self.threshold):
                ready.append(i)
        # Who is ready may be fewer than scheduled; the schedule's end writes the rest.
        count = view.scheduled or len(candidates)
        return argmaxes(view, ready or top_k(view.confidence, candidates, count))


def divergence(p: list[float], q: list[float]) -> float:
    """KL(p || q) over the `KEPT` most probable tokens of q and the rest."""
    kept = sorted(range(len(q)), key=lambda v: (-q[v], v))[:KEPT]
    pairs = [(p[v], q[v]) for v in kept]
    others = [v for v in range(len(q)) if v not in kept]
    pairs.append((sum(p[v] for v in others), sum(q[v] for v in others)))
    return sum(a * (math.log(a + 1e-12) - math.log(b + 1e-12)) for a, b in pairs)


@dataclass
class Credit:
    """CreditDecoding: a threshold on probabilities raised by credit.

    `parameter_free`: exponent 1; weight and decay are the decided share of the block.
    """

    threshold: float = 0.9
    weight: float = 0.7
    exponent: float = 0.2
    decay: float = 0.8
    parameter_free: bool = False
    credit: list[dict[int, float]] = field(default_factory=list)
    """Per position: token -> credit."""

    def decide(self, view: View) -> dict[int, int]:
        size = len(view.masked)
        weight, exponent, decay = self.weight, self.exponent, self.decay
        if self.parameter_free:
            decided = int(view.decided.sum()) / size
            weight, exponent, decay = decided, 1.0, decided
        self.credit = self.credit or [{} for _ in range(size)]
        tokens, confidence = view.argmax.clone(), torch.zeros(size)
        for credit in self.credit:
            for token in credit:
                credit[token] *= decay
        for i in view.masked_offsets():
            credit = self.credit[i]
            candidate = int(view.argmax[i])
            p = view.probabilities[i].double()
            p[candidate] = view.confidence[i]
            credit[candidate] = (
                credit.get(candidate, 0.0) + float(p[candidate]) ** exponent
            )
            raised = p.clone()
            for token, value in credit.items():
                raised[token] *= (1 + value) ** weight
            fused = raised / (1 + (raised - p).sum())
            tokens[i] = max(credit, key=lambda token: float(fused[token]))
            confidence[i] = fused[tokens[i]]
        candidates = view.masked_offsets()
        sure = [i for i in candidates if confidence[i] >= float32(self.threshold)]
        chosen = {*sure, *top_k(confidence, candidates, 1)}
        return {i: int(tokens[i]) for i in sorted(chosen)}


@dataclass
class SlowFast:
    """SlowFast: a slow phase finds where the span ends, a fast one fills it.

    `end` is None in the slow phase.
    """

    threshold: float = 0.85
    horizon_threshold: float = 0.1
    slow_steps: int = 8
    start: int = 0
    end: int | None = None
    horizons: list[int] = field(default_factory=list)
    """Of this cycle's slow steps."""

    def decide(self, view: View) -> dict[int, int]:
        candidates, c = view.masked_offsets(), view.confidence
        if self.end is not None and all(i >= self.end for i in candidates):
            self.start, self.end, self.horizons = self.end, None, []
        if self.end is None:
            span = candidates
            self.explore(view)
        else:
            span = [i for i in candidates if i < self.end]
        sure = [i for i in span if c[i] >= float32(self.threshold)]
        if len(sure) < 2:
            sure = top_k(c, span, 1)
        return argmaxes(view, sure)

    def explore(self, view: View) -> None:
        """One look at how far the model sees, which may end the slow phase."""
        seen = [
            i
            for i in view.masked_offsets()
            if view.confidence[i] >= float32(self.horizon_threshold)
        ]
        self.horizons.append(max(seen) + 1 if seen else self.start + 1)
        recent = self.horizons[-2:]
        mean = sum(recent) / len(recent)
        variance = sum((h - mean) ** 2 for h in recent) / len(recent)
        if len(recent) == 2 and math.sqrt(variance) < 1.0:
            self.end = recent[-1]
        elif len(self.horizons) >= self.slow_steps:
            self.end = int(mean)
