# SPDX-License-Identifier: Apache-2.0
"""Decoding rules that look at where masks stand; otherwise as those of `rules`.

LocalLeap (arXiv 2510.07081): masks near sure ones. Hierarchical decoding (dInfer,
2510.08666): runs of adjacent masks. PC-Sampler (NEUIR/PC-Sampler): early ones.
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
