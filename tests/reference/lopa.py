# SPDX-License-Identifier: Apache-2.0
"""LoPA (arXiv 2512.16229) in plain loops: one request, greedy, one canvas at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from reference.place_rules import multi_block
from reference.procedures import Statistics
from reference.rules import View, top_k

CLOSE = 1e-5
"""Branches whose confidences are closer may be told apart either way."""


class Decoded(NamedTuple):
    """What a request comes to."""

    tokens: list[int]
    forwards: int
    is_close: bool
    """Whether two branches were closer than `CLOSE`."""
    kept: list[int]
    """The branch that each forward kept."""


def decode(
    predict: Callable[[list[int], int, int, bool], Statistics],
    prompt: list[int],
    ends: list[int],
    *,
    mask_id: int,
    branches: int = 4,
    threshold: float = 0.9,
    block: int = 32,
    open_at: float = 0.1,
    due_at: float = 0.95,
    whole_row: bool = True,
    stops: Collection[int] = (),
) -> Decoded:
    """Decode one request.

    Args:
        predict: statistics of positions [start, end) of a row; and whether this is the
            first forward for them.
        ends: where the blocks that are decided together end, one after another.
        whole_row: the masks of later blocks are there to see.
        stops: tokens that end the text.
    """
    rule = multi_block(block, threshold, open_at, due_at, "confidence", "each")
    row = [*prompt, *[mask_id] * (ends[-1] - len(prompt))]
    set_at = [-1] * len(row)
    forwards, start, is_close, kept = 0, len(prompt), False, []
    for end in ends:
        drafts: list[tuple[int, int]] = []
        is_first = True
        while mask_id in row[start:end]:
            tried = []
            for draft in [None, *drafts]:
                canvas = row[:] if whole_row else row[:end]
                if draft is not None:
                    canvas[draft[0]] = draft[1]
                stats = predict(canvas, start, end, is_first)
                view = _view(canvas, start, end, mask_id, stats, forwards)
                ahead = _ahead(view, block, open_at)
                if ahead:
                    mean = float(sum(view.confidence[ahead]) / len(ahead))
                    tried.append((mean, draft, view, ahead))
            is_first = False
            best = max(tried, key=lambda one: one[0])
            others = sorted(one[0] for one in tried)
            is_close |= len(others) > 1 and others[-1] - others[-2] < CLOSE
            kept.append(tried.index(best))
            _, draft, view, ahead = best
            if draft is not None:
                row[draft[0]], set_at[draft[0]] = draft[1], forwards
            commit = rule.step(view).commit
            for offset in commit:
                row[start + offset] = int(view.argmax[offset])
                set_at[start + offset] = forwards
            left = [i for i in ahead if i not in commit]
            drafts = [
                (start + i, int(view.argmax[i]))
                for i in top_k(view.confidence, left, branches - 1)
            ]
            forwards += 1
        start = end
        stop = next((i for i in range(len(prompt), end) if row[i] in stops), None)
        if stop is not None:
            return _cut(row, set_at, len(prompt), stop + 1, is_close, kept)
    return _cut(row, set_at, len(prompt), len(row), is_close, kept)


def _cut(
    row: list[int],
    set_at: list[int],
    begin: int,
    end: int,
    is_close: bool,
    kept: list[int],
) -> Decoded:
    """The text; its last token is final once nothing left of it is masked."""
    return Decoded(row[begin:end], max(set_at[begin:end]) + 1, is_close, kept)


def _view(
    row: list[int], begin: int, end: int, mask_id: int, stats: Statistics, forward: int
) -> View:
    masked = torch.tensor([token == mask_id for token in row[begin:end]])
    return View(
        masked=masked,
        argmax=stats.argmax,
        confidence=stats.confidence,
        margin=stats.margin,
        entropy=stats.entropy,
        first=0,
        forward=forward,
        scheduled=1,
        decided=~masked,
    )


def _ahead(view: View, block: int, open_at: float) -> list[int]:
    """The masks of blocks that are begun."""
    size = len(view.masked)
    found: list[int] = []
    for first in range(0, size, block):
        part = range(first, min(first + block, size))
        found += [i for i in part if view.masked[i]]
        written = sum(not view.masked[i] for i in part)
        if written < float(torch.tensor(open_at)) * len(part):
            break
    return found
