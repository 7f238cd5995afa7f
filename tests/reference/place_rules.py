# SPDX-License-Identifier: Apache-2.0
"""Decoding rules that look at where masks stand; otherwise as those of `rules`.

LocalLeap (arXiv 2510.07081): masks near sure ones. Hierarchical decoding (dInfer,
2510.08666): runs of adjacent masks. PC-Sampler (NEUIR/PC-Sampler): early ones.
Multi-block decoding (d3LLM, 2601.07568; D2F, 2508.09192): blocks that are begun.
"""

from __future__ import annotations

import math

import torch
from reference.rules import Rule, Step, View, float32, top_k


def localleap(
    threshold: float = 0.9, relaxed_threshold: float = 0.75, radius: int = 4
) -> Rule:
    """LocalLeap: masks with c >= threshold are anchors, and relax the bound near them.

    Anchors are written, masks at most `radius` from one with c >= relaxed_threshold,
    and the best one.
    """

    def select(view: View) -> list[int]:
        candidates = view.masked_offsets()
        c = view.confidence
        anchors = [i for i in candidates if c[i] >= float32(threshold)]
        chosen = {*anchors, *top_k(c, candidates, 1)}
        for anchor in anchors:
            for i in candidates:
                if abs(i - anchor) <= radius and c[i] >= float32(relaxed_threshold):
                    chosen.add(i)
        return sorted(chosen)

    return Rule(select)


def hierarchy(
    threshold: float = 0.9, low_threshold: float = 0.4, remask: bool = False
) -> Rule:
    """dInfer: the best of each run of adjacent masks, and all masks that are sure.

    If no confidence reaches `low_threshold`, only the best one; else every c >
    threshold, and the best of each run if it is > low_threshold. (dInfer's code writes
    nothing if none passes; here the best one is written.)

    `remask`: decided positions with c < low_threshold are masked again, the least sure
    first and at most as many as there are masks but one; if not more are written than
    that, the best of the other masks are, too.
    """

    def select(view: View) -> list[int] | Step:
        chosen = commits(view)
        if not remask:
            return chosen
        masks = view.masked_offsets()
        doubtful = [
            i
            for i in range(len(view.masked))
            if view.decided[i] and view.confidence[i] < float32(low_threshold)
        ]
        back = top_k(-view.confidence, doubtful, max(len(masks) - 1, 0))
        others = [i for i in masks if i not in chosen]
        missing = max(len(back) + 1 - len(chosen), 0)
        chosen = [*chosen, *top_k(view.confidence, others, missing)]
        return Step(sorted(chosen), remask=sorted(back))

    def commits(view: View) -> list[int]:
        candidates = view.masked_offsets()
        c = view.confidence
        best = top_k(c, candidates, 1)
        if all(c[i] < float32(low_threshold) for i in candidates):
            return best
        runs: list[list[int]] = []
        for i in candidates:
            if runs and runs[-1][-1] == i - 1:
                runs[-1].append(i)
            else:
                runs.append([i])
        chosen = {i for i in candidates if c[i] > float32(threshold)}
        for run in runs:
            leader = top_k(c, run, 1)[0]
            if c[leader] > float32(low_threshold):
                chosen.add(leader)
        return sorted(chosen or best)

    return Rule(select, rewrites=remask)


def pc(
    frequencies: torch.Tensor, position_weight: float = 0.25, most: float = 10.0
) -> Rule:
    """PC-Sampler: the scheduled number of positions that are early, sure and rare.

    `frequencies` [V]: share of each token in a corpus; others count as the rarest.
    """

    def select(view: View) -> list[int]:
        scores = torch.zeros(len(view.masked), dtype=torch.float64)
        for i in view.masked_offsets():
            token = int(view.argmax[i])
            known = token < len(frequencies)
            frequency = frequencies[token] if known else frequencies.min()
            value = -float(view.confidence[i]) * math.log(float(frequency))
            place = math.exp(-position_weight * (view.first + i))
            scores[i] = place * min(value, most)
        return top_k(scores, view.masked_offsets(), view.scheduled)

    return Rule(select, ends_by_schedule=True)


def multi_block(
    block: int = 32,
    threshold: float = 0.5,
    open_at: float = 0.1,
    due_at: float = 0.95,
    by: str = "entropy",
    push: str = "first",
) -> Rule:
    """Sure masks of all blocks that are begun; of some, one mask in any case.

    A block is begun once every block left of it is written to `open_at`. The first one
    with a mask ("first", and then the surest of all that are begun, too), or each whose
    left neighbour is written to `due_at` ("each"), gets a token in every step.
    """

    def select(view: View) -> list[int]:
        size = len(view.masked)
        parts = [range(i, min(i + block, size)) for i in range(0, size, block)]
        scores = -view.entropy if by == "entropy" else view.confidence

        def is_sure(i: int) -> bool:
            if by == "entropy":
                return bool(view.entropy[i] <= float32(threshold))
            return bool(view.confidence[i] > float32(threshold))

        def is_written(part: range, share: float) -> bool:
            own = [i for i in part if view.first + i >= 0]
            count = sum(bool(view.decided[i]) for i in own)
            return count >= float(float32(share)) * len(own)

        begun = []
        for number, part in enumerate(parts):
            if all(is_written(left, open_at) for left in parts[:number]):
                masks = [i for i in part if view.masked[i]]
                is_due = not number or is_written(parts[number - 1], due_at)
                begun.append((masks, is_due))
        everything = [i for masks, _ in begun for i in masks]
        chosen = {i for i in everything if is_sure(i)}
        if push == "first":
            chosen |= set(top_k(scores, everything, 1))
            with_masks = [masks for masks, _ in begun if masks]
            pushed = with_masks[:1]
        else:
            pushed = [masks for masks, is_due in begun if is_due]
        for masks in pushed:
            if not chosen.intersection(masks):
                chosen |= set(top_k(scores, masks, 1))
        return sorted(chosen)

    return Rule(select)


class FlightLog:
    """The published loops: they open a block at most each step, and remember it."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.masks: list[int] = []
        self.is_due: list[bool] = []

    def begin_step(self, block: int, open_at: float, due_at: float) -> int:
        """How many blocks are in flight or done in this step."""

        def share(number: int) -> float:
            return 1 - self.masks[number] / block

        if not self.masks:
            self.masks, self.is_due = [block], [True]
        elif len(self.masks) < self.num_blocks and share(-1) >= open_at:
            self.masks.append(block)
            self.is_due.append(False)
        for number in range(1, len(self.masks)):
            self.is_due[number] |= share(number - 1) >= due_at
        return len(self.masks)
