# SPDX-License-Identifier: Apache-2.0
"""Decoding rules that rewrite, or that lay out a whole canvas, in plain loops.

Joint thresholds (LLaDA2.1, arXiv 2602.08676), Saber (github.com/zhaoyMa/Saber), EOSER
and ASS (2509.23924), and this package's reconstruction of explore-then-exploit
(2511.21103). Rules with memory are classes as in `stateful_rules`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from reference.rules import Rule, Step, View, float32, top_k
from reference.stateful_rules import remembering


@dataclass
class Joint:
    """LLaDA2.1: masks above one threshold, edits above another, then only edits.

    `post_steps` are the steps so far that began without a mask: after `max_post_steps`
    of these, or one that changed nothing, a block without masks is over.
    """

    mask_threshold: float = 0.7
    edit_threshold: float = 0.5
    max_post_steps: int = 16
    penalty: float = 0.0
    post_steps: int = 0

    def decide(self, view: View) -> Step:
        if self.penalty:
            view = without_stutter(view, self.penalty)
        masks = view.masked_offsets()
        c = view.confidence
        commit = [i for i in masks if c[i] > float32(self.mask_threshold)]
        commit = commit or top_k(c, masks, 1)
        edit = []
        for i in range(len(c)):
            differs = view.decided[i] and view.argmax[i] != view.tokens[i]
            if differs and c[i] > float32(self.edit_threshold):
                edit.append(i)
        # Of the whole block, where `view.masked` may be a part of it.
        places = [i for i in range(len(c)) if view.first + i >= 0]
        masked = [i for i in places if not view.decided[i]]
        self.post_steps += not masked
        if self.penalty:
            commit, edit = (
                {i: int(view.argmax[i]) for i in part} for part in (commit, edit)
            )
        if any(i not in commit for i in masked):
            return Step(commit, edit)
        again = bool(commit or edit) and self.post_steps < self.max_post_steps
        return Step(commit, edit, hold=again)


def without_stutter(view: View, penalty: float) -> View:
    """The view after the logit of the token to the left was lowered everywhere."""
    argmax, confidence = view.argmax.clone(), view.confidence.clone()
    for i in range(1, len(argmax)):
        if not view.decided[i - 1] and view.first + i - 1 >= 0:
            continue  # a mask
        logits = view.probabilities[i].double().log()
        logits[int(view.tokens[i - 1])] -= penalty
        p = logits.softmax(dim=0)
        argmax[i] = int(p.argmax())
        confidence[i] = p.max()
    return replace(view, argmax=argmax, confidence=confidence)


def joint(
    mask_threshold: float,
    edit_threshold: float,
    max_post_steps: int = 16,
    penalty: float = 0.0,
) -> Rule:
    numbers = (mask_threshold, edit_threshold, max_post_steps, penalty)
    return remembering(lambda: Joint(*numbers))._replace(rewrites=True)


@dataclass
class Saber:
    """Saber: above the mean of what was written; what gained least is masked again."""

    fewest: int = 2
    written_with: dict[int, float] = field(default_factory=dict)
    last: list[float] = field(default_factory=list)

    def decide(self, view: View) -> Step:
        masks = view.masked_offsets()
        c = view.confidence.tolist()
        bar = 1.0
        if self.written_with:
            bar = sum(self.written_with.values()) / len(self.written_with)
        write = [i for i in masks if c[i] > bar]
        if len(write) < self.fewest:
            write = top_k(view.confidence, masks, self.fewest)
        for i in write:
            self.written_with[i] = c[i]
        last = self.last or [0.0] * len(c)
        self.last = c
        if len(write) == len(masks):
            return Step(write)
        count = max(self.fewest, len(write))
        back = max(self.fewest // 2, math.ceil(count / 8))
        back = min(back, count - 1)
        standing = [i for i in range(len(c)) if view.decided[i] or i in write]
        growth = {i: view.confidence[i] - float32(last[i]) for i in standing}
        standing.sort(key=lambda i: (float(growth[i]), i))
        again = standing[:back]
        return Step(
            [i for i in write if i not in again],
            remask=[i for i in again if i not in write],
        )


def saber(fewest: int = 2) -> Rule:
    return remembering(lambda: Saber(fewest))._replace(rewrites=True)


def doubling(masks: int) -> list[int]:
    """ASS: tokens of each step for a block of `masks`: 1, 2, 4, ..., the rest."""
    steps = max(len(bin(masks)) - 3, 1)  # floor(log2), without its rounding
    counts = [2**step for step in range(steps - 1)]
    return [*counts, masks - sum(counts)]


@dataclass
class Doubling:
    """ASS; with `eos_ids` and weights, EOSER in that schedule."""

    eos_ids: Collection[int] = ()
    first_weight: float = 1.0
    last_weight: float = 1.0
    schedule: list[int] = field(default_factory=list)

    def decide(self, view: View) -> list[int]:
        masks = view.masked_offsets()
        self.schedule = self.schedule or doubling(len(masks) + view.kept)
        steps = len(self.schedule)
        time = (2 ** (view.step + 1) - 1) / 2**steps
        weights = (self.first_weight, self.last_weight)
        scores = damped(view, self.eos_ids, *weights, time)
        # Not all could be written in time where some could not be seen.
        count = self.schedule[view.step] if view.step < steps else len(masks)
        return best(scores, masks, count)


def ass() -> Rule:
    return _doubling(Doubling)


def _doubling(begin: Callable[[], Doubling]) -> Rule:
    return remembering(begin)._replace(
        ends_by_schedule=True, own_steps=lambda masks: len(doubling(masks))
    )


def eoser(
    eos_ids: Collection[int],
    schedule: str = "even",
    first_weight: float = 0.4,
    last_weight: float = 1.0,
) -> Rule:
    """EOSER: the scheduled number of the best, end-of-text tokens damped early."""
    weights = (first_weight, last_weight)
    if schedule == "doubling":
        return _doubling(lambda: Doubling(eos_ids, *weights))

    def select(view: View) -> list[int]:
        time = 1.0 if view.steps == 1 else view.step / (view.steps - 1)
        scores = damped(view, eos_ids, *weights, min(time, 1.0))
        return best(scores, view.masked_offsets(), view.scheduled)

    return Rule(select, ends_by_schedule=True)


def damped(
    view: View, eos_ids: Collection[int], first: float, last: float, time: float
) -> list[float]:
    """Confidences; those of tokens in `eos_ids` times a weight that grows in time."""
    first, last = float(float32(first)), float(float32(last))
    weight = first + (last - first) * min(time, 1.0)
    return [
        c * weight if int(token) in eos_ids else c
        for c, token in zip(view.confidence.tolist(), view.argmax, strict=True)
    ]


def best(scores: list[float], among: list[int], count: int) -> list[int]:
    return sorted(sorted(among, key=lambda i: (-scores[i], i))[:count])


def ete(
    threshold: float = 0.9,
    window: int = 32,
    ahead: int = 1,
    fewest_bits: float = 1.0,
    fewest_tokens: int = 2,
    begin: int = 0,
) -> Rule:
    """Explore-then-exploit, as reconstructed; `begin`: output tokens left of the row.

    Writes the sure masks of some windows, and of the first one the least certain other,
    where the sure ones are too few or tell too little.
    """

    def select(view: View) -> list[int]:
        masks = view.masked_offsets()
        if not masks:
            return []
        c = view.confidence
        windows = {i: (begin + view.first + i) // window for i in masks}
        active = min(windows.values())
        sure = [i for i in masks if c[i] >= float32(threshold)]
        sure = [i for i in sure if windows[i] <= active + ahead]
        bits = sum(-math.log2(float(c[i])) for i in sure)
        others = [i for i in masks if windows[i] == active and i not in sure]
        explored = []
        if bits < float(float32(fewest_bits)) or len(sure) < fewest_tokens:
            explored = top_k(view.entropy, others, 1)
        return sorted([*sure, *explored]) or top_k(c, others, 1)

    return Rule(select)
