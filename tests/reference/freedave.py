# SPDX-License-Identifier: Apache-2.0
"""FreeDave's steps of one row in plain Python, and a block decoded with them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from reference.views import make_view, select

from vllm_dlm.strategies.base import NOT_DRAFTED, Branches, Decision, View
from vllm_dlm.strategies.freedave import FreeDave

Canvas = tuple[int | None, ...]
"""A block's tokens, None where masked."""
Model = Callable[[Canvas], tuple[list[int], list[float]]]
"""Predicted tokens and their probabilities, at each position."""


class Made(NamedTuple):
    """A step of one row in plain Python."""

    writes: dict[int, tuple[int, int]]
    """Position -> token, branch that it was predicted in."""
    drafts: list[tuple[int, int]]
    """Positions and tokens, by rank."""


def step_of(masked: list[int], confidence: list[float], threshold: float) -> list[int]:
    """Positions that sequential or threshold decoding writes."""
    sure = [i for i in masked if confidence[i] >= threshold]
    return sure or [max(masked, key=lambda i: (confidence[i], -i))]


def places_of(flags: torch.Tensor) -> list[list[int]]:
    """Of each row of flags [K, B], where they are set."""
    return [[i for i, flag in enumerate(row) if flag] for row in flags.tolist()]


def made_by_hand(branches: Branches, row: int, threshold: float) -> Made:
    """What `FreeDave.select` should do with a row."""
    masked = places_of(branches.masked[row])
    confidence = branches.confidence[row].tolist()
    candidate = branches.candidate[row].tolist()
    rank, tokens = branches.rank[row].tolist(), branches.tokens[row].tolist()
    writes: dict[int, tuple[int, int]] = {}
    best = 0
    if not masked[0]:
        return Made({}, [])
    while True:
        step = step_of(masked[best], confidence[best], threshold)
        after = best + len(step)
        drafted = [i for i in range(len(rank)) if best <= rank[i] < after]
        right = drafted == step and all(candidate[best][i] == tokens[i] for i in step)
        if not right or after >= len(masked) or not masked[after]:
            break
        writes |= {i: (tokens[i], best) for i in step}
        best = after
    writes |= {i: (candidate[best][i], best) for i in step}
    left = [i for i in masked[best] if i not in step]
    part = [0] * len(rank)
    if branches.later is not None and branches.part is not None:
        left += places_of(branches.later[row])[best]
        part = branches.part[row].tolist()
    left.sort(key=lambda i: (part[i], -confidence[best][i], i))
    return Made(writes, [(i, candidate[best][i]) for i in left])


def made(decision: Decision, row: int) -> Made:
    """A row of a decision, in the same terms."""
    assert decision.new_tokens is not None and decision.branch is not None
    assert decision.draft_tokens is not None and decision.draft_rank is not None
    tokens, branch = decision.new_tokens[row].tolist(), decision.branch[row].tolist()
    positions = decision.commit[row].nonzero()[:, 0].tolist()
    rank, drafts = decision.draft_rank[row].tolist(), decision.draft_tokens[row]
    order = sorted((r, i) for i, r in enumerate(rank) if r != NOT_DRAFTED)
    assert [r for r, _ in order] == list(range(len(order)))
    return Made(
        {i: (tokens[i], branch[i]) for i in positions},
        [(i, int(drafts[i])) for _, i in order],
    )


def open_part(masked: list[int], part: int) -> list[int]:
    """The masks that may be written: of parts of this length, those of the first."""
    return [i for i in masked if i // part == min(masked) // part]


def evaluate(
    model: Model,
    canvas: Canvas,
    drafts: list[tuple[int, int]],
    count: int,
    part: int | None = None,
) -> Branches:
    """What an engine makes of a canvas and its drafts, `count` branches; one row.

    Args:
        part: length of the canvas's parts, which are all drafted; None for one part.
    """
    width = len(canvas)
    tokens, rank = [0] * width, [NOT_DRAFTED] * width
    for place, (i, token) in enumerate(drafts):
        tokens[i], rank[i] = token, place
    stacked: list[list[list]] = [[], [], [], []]
    for branch in range(count):
        filled = tuple(
            tokens[i] if rank[i] < branch else canvas[i] for i in range(width)
        )
        candidate, confidence = model(filled)
        masks = [i for i, token in enumerate(filled) if token is None]
        now = open_part(masks, part or width)
        masked = [i in now for i in range(width)]
        later = [i in masks and i not in now for i in range(width)]
        values = masked, candidate, confidence, later
        for column, own in zip(stacked, values, strict=True):
            column.append(own)
    masked, candidate, confidence, later = (torch.tensor([one]) for one in stacked)
    return Branches(
        torch.tensor([tokens]),
        torch.tensor([rank]),
        masked,
        candidate,
        confidence,
        later if part else None,
        torch.arange(width)[None] // part if part else None,
    )


def view_of(branches: Branches) -> View:
    """A view with these branches; branch 0 is its canvas."""
    return make_view(
        branches.confidence[:, 0],
        branches.masked[:, 0],
        candidate=branches.candidate[:, 0],
        branches=branches,
    )


def decode(
    model: Model,
    width: int,
    strategy: FreeDave,
    room: Callable[[], int] = lambda: 16,
    steps: list[int | None] | None = None,
    part: int | None = None,
) -> tuple[Canvas, int]:
    """Decode one block; its tokens, and the forwards it took.

    Args:
        part: as of `evaluate`.
        room: how many branches the engine makes at most, asked before each forward.
        steps: takes the step that each token is said to be written in.
    """
    done = 0
    canvas: Canvas = (None,) * width
    drafts: list[tuple[int, int]] = []
    forwards = 0
    while None in canvas:
        count = min(len(drafts) + 1, strategy.params.drafts, room())
        branches = evaluate(model, canvas, drafts, count, part)
        decision = select(strategy, view_of(branches))
        writes, drafts = made(decision, 0)
        assert writes and decision.step_ahead is not None
        ahead = decision.step_ahead[0].tolist()
        for i in writes if steps is not None else ():
            steps[i] = done + ahead[i]
        done += 1 + max(ahead[i] for i in writes)
        canvas = tuple(
            writes[i][0] if i in writes else token for i, token in enumerate(canvas)
        )
        forwards += 1
    return canvas, forwards


def followed(
    model: Model, width: int, threshold: float, part: int | None = None
) -> tuple[Canvas, int]:
    """The procedure that is followed: a step per forward, part after part."""
    canvas: Canvas = (None,) * width
    forwards = 0
    while None in canvas:
        candidate, confidence = model(canvas)
        masked = [i for i, token in enumerate(canvas) if token is None]
        masked = open_part(masked, part or width)
        step = step_of(masked, confidence, threshold)
        canvas = tuple(
            candidate[i] if i in step else token for i, token in enumerate(canvas)
        )
        forwards += 1
    return canvas, forwards


def moody(seed: int, moodiness: float) -> Model:
    """A model that changes its mind about some positions with what it sees."""

    def model(canvas: Canvas) -> tuple[list[int], list[float]]:
        settled = random.Random(seed)
        mood = random.Random(f"{seed}:{canvas}")
        tokens, confidence = [], []
        for _ in canvas:
            token, sure = settled.randrange(90), settled.random()
            if mood.random() < moodiness:
                token, sure = mood.randrange(90), mood.random()
            tokens.append(token)
            # Few values, so that some are equal; in float32 as in Python.
            confidence.append(round(sure * 16) / 16)
        return tokens, confidence

    return model
