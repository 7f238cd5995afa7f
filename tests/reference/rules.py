# SPDX-License-Identifier: Apache-2.0
"""Decoding rules of one request, in plain loops: which masks a step replaces.

Static schedules (LLaDA, arXiv 2502.09992), threshold and factor (Fast-dLLM,
2505.22618; threshold also as LLaDA2.0, 2512.15745, and SDAR, 2510.06303, have it),
Learn2PD's filter (2509.25188), Dream's schedule (2508.15487), entropy (dParallel,
2509.26488), EB-Sampler (2505.24857), CAD (CD4LM, 2601.02236). Every strategy is
compared with these, or with those of the other modules here, step by step.

Conventions: ties go to the lowest position; confidences are float32 probabilities of
untempered logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

STATIC_MODES = ("low_confidence", "margin", "entropy", "left_to_right", "random")
DREAM_ALGS = ("origin", "maskgit_plus", "topk_margin", "entropy")


@dataclass
class View:
    """The active block at one step; tensors are [B] and cover revealed positions too.

    B is smaller than the block length where EoTP or the context has cut the block.
    `first` is the block's first position counted from the prompt's end, `forward` the
    index of this forward in the request, `step` that in the block, of `steps`, and
    `scheduled` the number of commits that the schedule has for this step (in
    `procedures.generate`: 0 once it has run out).

    `tokens` and `decided`, for rules that rewrite: what the block holds, and which of
    it a rule may change.
    """

    masked: torch.Tensor
    argmax: torch.Tensor
    confidence: torch.Tensor
    margin: torch.Tensor
    entropy: torch.Tensor
    first: int
    forward: int
    scheduled: int
    step: int = 0
    steps: int = 1
    probabilities: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[B, V], of all tokens."""
    tokens: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    decided: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    kept: int = 0
    """Masks of the block that are not `masked`: kept for later steps by a window."""

    def masked_offsets(self) -> list[int]:
        return [i for i in range(len(self.masked)) if self.masked[i]]


class Step(NamedTuple):
    """All that a rule may do in a step, in block offsets.

    `commit` as `Rule.select` returns it, `edit` decided positions to give the argmax
    to, or with their tokens as there, `remask` those to mask again. `hold` keeps a
    block without masks open.
    """

    commit: list[int] | dict[int, int]
    edit: list[int] | dict[int, int] = []
    remask: list[int] = []
    hold: bool = False


class Rule(NamedTuple):
    """`select` returns the block offsets to commit, a subset of the masked ones.

    Where these are the keys of a dict, its values are the tokens to write instead of
    the argmax. A rule that does more returns a `Step`.

    `ends_by_schedule`: the published loop counts a block's steps out, so the block is
    over when they are, masks left or not, if the mask id may be chosen. Else it goes on
    until no mask is left. `own_steps` says how many they are for so many masks, where
    the rule has a schedule of its own.
    `rewrites`: it may edit and remask, so nothing of a block is final before its end.
    """

    select: Callable[[View], list[int] | dict[int, int] | Step]
    ends_by_schedule: bool = False
    rewrites: bool = False
    own_steps: Callable[[int], int] | None = None

    def step(self, view: View) -> Step:
        found = self.select(view)
        return found if isinstance(found, Step) else Step(found)


def float32(value: float) -> torch.Tensor:
    # Confidences are float32, so a bound of 0.9 means float32(0.9).
    return torch.tensor(value, dtype=torch.float32)


def top_k(scores: torch.Tensor, candidates: list[int], k: int) -> list[int]:
    """The k best candidates by score, the lower offset first on a tie."""
    return sorted(candidates, key=lambda i: (-float(scores[i]), i))[:k]


def static_schedule(num_masked: int, num_steps: int) -> list[int]:
    """Commits per step: m // s, and one more in each of the first m mod s steps."""
    base, rest = divmod(num_masked, num_steps)
    return [base + (step < rest) for step in range(num_steps)]


def static(
    mode: str = "low_confidence",
    random_scores: Callable[[int, int], float] | torch.Tensor | None = None,
) -> Rule:
    """LLaDA's rule: the scheduled number of masked positions with the best score.

    `random_scores`, for mode "random": uniform numbers, either a table
    [forwards, gen_length] or a function of (forward index, position counted from
    the prompt's end).
    """
    if mode not in STATIC_MODES:
        raise ValueError(f"mode {mode!r} is not one of {STATIC_MODES}")
    if mode == "random" and random_scores is None:
        raise ValueError("mode 'random' needs random_scores")

    def select(view: View) -> list[int]:
        size = len(view.masked)
        if mode == "low_confidence":
            scores = view.confidence
        elif mode == "margin":
            scores = view.margin
        elif mode == "entropy":
            scores = -view.entropy
        elif mode == "left_to_right":
            scores = -torch.arange(size)
        elif callable(random_scores):
            scores = torch.tensor(
                [random_scores(view.forward, view.first + i) for i in range(size)]
            )
        else:
            scores = random_scores[view.forward, view.first : view.first + size]
        return top_k(scores, view.masked_offsets(), view.scheduled)

    return Rule(select, ends_by_schedule=True)


def threshold(tau: float, strict: bool = False, at_least: str = "best") -> Rule:
    """Every masked position with confidence >= tau (`strict`: > tau), if enough are.

    Where fewer are than `at_least` asks for: "best" (Fast-dLLM) writes the best one,
    "scheduled" (LLaDA2.0, SDAR) exactly the `View.scheduled` best.
    """
    if at_least not in ("best", "scheduled"):
        raise ValueError(f"at_least {at_least!r} is not 'best' or 'scheduled'")

    def select(view: View) -> list[int]:
        candidates = view.masked_offsets()
        least = view.scheduled if at_least == "scheduled" else 1
        sure = []
        for i in candidates:
            above = view.confidence[i] > float32(tau)
            if above or (not strict and view.confidence[i] == float32(tau)):
                sure.append(i)
        if len(sure) >= least:
            return sure
        return sorted(top_k(view.confidence, candidates, least))

    return Rule(select, ends_by_schedule=at_least == "scheduled")


def factor(f: float) -> Rule:
    """Fast-dLLM: the n best, n maximal with (j+1)(1-c_(j)) < f for j = 2..n.

    c_(1) >= c_(2) >= ... are the masked positions' confidences; the first always
    passes. (The published loop also commits the last candidate when it alone
    fails; the definition does not.)
    """

    def select(view: View) -> list[int]:
        candidates = view.masked_offsets()
        order = top_k(view.confidence, candidates, len(candidates))
        n = 1
        while n < len(order):
            j = n + 1
            if not bool((j + 1) * (1 - view.confidence[order[j - 1]]) < f):
                break
            n = j
        return sorted(order[:n])

    return Rule(select)


def learn2pd(
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    *,
    tau: float = 0.96,
    k: int = 1,
) -> Rule:
    """Learn2PD: the masked positions that a tiny filter trusts, plus the k best.

    q = sigmoid(w2 relu(w1 c + b1) + b2) > tau, with c [B] the confidences of the
    whole block: those of revealed positions are the model's in its own argmax, and
    positions that EoTP cut away count as 1.0. B is the filter's width.
    """
    width = b2.shape[0]

    def select(view: View) -> list[int]:
        candidates = view.masked_offsets()
        c = torch.ones(width)
        c[: len(view.confidence)] = view.confidence
        z = w2 @ torch.relu(w1 @ c + b1) + b2
        accepted = z.sigmoid() > float32(tau)
        forced = top_k(view.confidence, candidates, k)
        return sorted({i for i in candidates if accepted[i]} | set(forced))

    return Rule(select)


def dream(
    alg: str = "entropy",
    eps: float = 1e-3,
    alg_temp: float = 0.0,
    uniform: Callable[[View], torch.Tensor] | None = None,
) -> Rule:
    """Dream's schedule: time falls from 1 to eps, and each step takes its share.

    The step from time t to s writes the int(m (1 - s / t)) best of m masks, which may
    be none, and the last step all. `alg_temp` > 0 draws them without replacement, with
    probability softmax(score / alg_temp). "origin" writes each mask with probability
    1 - s / t.

    `uniform`, for "origin" and `alg_temp`: a view -> numbers [B] in [0, 1).
    """
    if alg not in DREAM_ALGS:
        raise ValueError(f"alg {alg!r} is not one of {DREAM_ALGS}")
    if uniform is None and (alg == "origin" or alg_temp > 0):
        raise ValueError("alg 'origin' and alg_temp need uniform")

    def select(view: View) -> list[int]:
        candidates = view.masked_offsets()
        if view.step >= view.steps - 1:
            return candidates
        times = torch.linspace(1, eps, view.steps + 1)
        share = 1 - times[view.step + 1] / times[view.step]
        if alg == "origin":
            return [i for i in candidates if uniform(view)[i] < share]
        masks = float(len(candidates) + view.kept)
        count = int(torch.tensor(masks) * share)
        if alg == "maskgit_plus":
            scores = view.confidence
        elif alg == "topk_margin":
            scores = view.margin
        else:
            scores = -view.entropy
        if alg_temp == 0:
            return top_k(scores, candidates, count)
        scores = scores.double() / float32(alg_temp).double()
        for i, u in enumerate(uniform(view).tolist()):
            gumbel = -math.log(-math.log(max(u, 1e-38)))  # a u of 0 has no logarithm
            scores[i] += gumbel
        return top_k(scores, candidates, count)

    return Rule(select, ends_by_schedule=True)


def entropy(tau: float) -> Rule:
    """dParallel: every masked position with entropy <= tau, and the least uncertain."""

    def select(view: View) -> list[int]:
        candidates = view.masked_offsets()
        sure = [i for i in candidates if view.entropy[i] <= float32(tau)]
        return sure or top_k(-view.entropy, candidates, 1)

    return Rule(select)


def entropy_bounded(bound: float) -> Rule:
    """EB-Sampler: the n of least entropy, n maximal with sum - largest <= bound."""

    def select(view: View) -> list[int]:
        candidates = view.masked_offsets()
        chosen: list[int] = []
        for i in top_k(-view.entropy, candidates, len(candidates)):
            entropies = [float(view.entropy[j]) for j in [*chosen, i]]
            if sum(entropies) - max(entropies) > float(float32(bound)):
                break
            chosen.append(i)
        return sorted(chosen)

    return Rule(select)


def cad(tau: float, fewest: int, most: int, mode: str = "confidence") -> Rule:
    """CD4LM: as many of the best as are sure, but at least `fewest`, at most `most`.

    Sure is confidence >= tau or, in the mode "entropy", entropy <= tau.
    """

    def select(view: View) -> list[int]:
        candidates = view.masked_offsets()
        if mode == "entropy":
            scores = -view.entropy
            sure = [i for i in candidates if view.entropy[i] <= float32(tau)]
        else:
            scores = view.confidence
            sure = [i for i in candidates if view.confidence[i] >= float32(tau)]
        count = min(max(len(sure), fewest), most)
        return sorted(top_k(scores, candidates, count))

    return Rule(select)


def prophet(
    width: int,
    *,
    early: float = 7.5,
    middle: float = 5.0,
    late: float = 2.5,
    early_until: float = 0.33,
    middle_until: float = 0.67,
    span: int = 32,
    answer_start: int = -1,
    answer_width: int = 5,
    begin: int = 0,
    eos_ids: Collection[int] = (),
) -> Rule:
    """Prophet: LLaDA's loop over spans, left early with everything that is masked.

    Args:
        width: of the canvas, of which the view may be a part.
        span: the published loop's block, in a canvas that is one block here.
        begin: output tokens left of the canvas.
        eos_ids: tokens that end the text, whose masks are looked at last of all.
    """

    def gap(view: View, offset: int) -> float:
        best = view.probabilities[offset].double().log().topk(2).values
        return float(best[0] - best[1])

    def select(view: View) -> list[int]:
        candidates = view.masked_offsets()
        if not candidates:
            return []
        looked_at = [i for i in candidates if int(view.argmax[i]) not in eos_ids]
        looked_at = looked_at or candidates
        if answer_start >= 0:
            wanted = range(answer_start, answer_start + answer_width)
            places = [begin + view.first + i for i in range(len(view.masked))]
            looked_at = [i for i, place in enumerate(places) if place in wanted]
        if looked_at:
            mean = sum(gap(view, i) for i in looked_at) / len(looked_at)
            progress = (view.step + 1) / view.steps
            if progress < early_until:
                bar = early
            else:
                bar = middle if progress < middle_until else late
            if mean >= bar:
                return candidates
        number = candidates[0] // span
        steps = max(view.steps // math.ceil(width / span), 1)
        within = range(number * span, min((number + 1) * span, len(view.masked)))
        schedule = static_schedule(len(within), steps)
        step = view.step - number * steps
        # A safe number where others have changed the order of things.
        count = schedule[step] if 0 <= step < steps else schedule[-1 if step > 0 else 0]
        masked = [i for i in candidates if i in within]
        return sorted(top_k(view.confidence, masked, max(count, 1)))

    return Rule(select, ends_by_schedule=True)
