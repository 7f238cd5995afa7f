# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reference.freedave import (
    Canvas,
    Made,
    Model,
    decode,
    evaluate,
    followed,
    made,
    made_by_hand,
    moody,
    step_of,
    view_of,
)
from reference.views import C8, CPU, chosen, make_view, random_view, row_params, select

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import (
    NOT_DRAFTED,
    Branches,
    View,
    numeric_fields,
)
from vllm_dlm.strategies.freedave import FreeDave, FreeDaveParams
from vllm_dlm.strategies.static import Static, StaticParams
from vllm_dlm.strategies.threshold import Threshold, ThresholdParams


def freedave(**params: float) -> FreeDave:
    return FreeDave(FreeDaveParams(**params), 8, CPU)


# -- the worked example: a, b, c are 1, 2, 3; x is 9 ----------------------------


def doubtful(canvas: Canvas) -> tuple[list[int], list[float]]:
    """The third token is x until the first is known."""
    a, b, _ = canvas
    third = (9, 0.7) if a is None else (3, 0.97 if b is not None else 0.5)
    return [1, 2, third[0]], [0.9, 0.6 if a is None else 0.8, third[1]]


def resolute(canvas: Canvas) -> tuple[list[int], list[float]]:
    return [1, 2, 3], [0.9, 0.7, 0.6]


@pytest.mark.parametrize(
    ("model", "drafts", "forwards"),
    [
        (doubtful, 1, 3),
        (doubtful, 3, 3),
        (resolute, 1, 3),
        (resolute, 2, 2),
        (resolute, 3, 2),
    ],
)
def test_worked_example(model: Model, drafts: int, forwards: int):
    assert decode(model, 3, freedave(drafts=drafts)) == ((1, 2, 3), forwards)
    assert followed(model, 3, 2.0) == ((1, 2, 3), 3)


def test_worked_steps():
    """The draft x is wrong: forward 2 writes b, and drafts c."""
    first = select(freedave(), view_of(evaluate(doubtful, (None,) * 3, [], 1)))
    assert made(first, 0) == Made({0: (1, 0)}, [(2, 9), (1, 2)])
    branches = evaluate(doubtful, (1, None, None), [(2, 9), (1, 2)], 2)
    second = select(freedave(), view_of(branches))
    assert made(second, 0) == Made({1: (2, 0)}, [(2, 3)])
    # Where it is right, branch 1 writes the last token in the same forward.
    branches = evaluate(resolute, (1, None, None), [(1, 2), (2, 3)], 2)
    second = select(freedave(), view_of(branches))
    assert made(second, 0) == Made({1: (2, 0), 2: (3, 1)}, [])


def test_sure_tokens_together():
    """freedave++: a branch is gone on to if it holds all that a step writes."""

    def model(canvas: Canvas) -> tuple[list[int], list[float]]:
        return [1, 2, 3, 4], [0.9, 0.8, 0.5, 0.4]

    drafts = [(0, 1), (1, 2), (2, 3), (3, 4)]
    branches = evaluate(model, (None,) * 4, drafts, 4)
    got = made(select(freedave(threshold=0.7), view_of(branches)), 0)
    # 0 and 1 are sure: branch 2, which writes the best of what is left; branch 3 the
    # last one.
    assert got == Made({0: (1, 0), 1: (2, 0), 2: (3, 2), 3: (4, 3)}, [])
    branches = evaluate(model, (None,) * 4, drafts, 2)
    got = made(select(freedave(threshold=0.7), view_of(branches)), 0)
    # Branch 1 is only a part of the step.
    assert got == Made({0: (1, 0), 1: (2, 0)}, [(2, 3), (3, 4)])


# -- whole blocks ---------------------------------------------------------------

thresholds = st.sampled_from([0.25, 0.5, 0.75, 0.9, 1.0, 1.5, 2.0])


@given(
    seed=st.integers(0, 2**20),
    moodiness=st.sampled_from([0.0, 0.05, 0.2, 1.0]),
    drafts=st.integers(1, 9),
    threshold=thresholds,
)
def test_loses_nothing_and_needs_no_more_forwards(seed, moodiness, drafts, threshold):
    model = moody(seed, moodiness)
    strategy = freedave(drafts=drafts, threshold=threshold)
    tokens, forwards = decode(model, 8, strategy)
    wanted, most = followed(model, 8, threshold)
    assert tokens == wanted
    assert forwards <= most
    if moodiness == 0 and threshold > 1:
        # The first forward has no drafts to verify.
        assert forwards == 1 + -(-7 // drafts)


@given(
    seed=st.integers(0, 2**20),
    moodiness=st.sampled_from([0.0, 0.05, 0.2, 1.0]),
    drafts=st.integers(1, 9),
    threshold=thresholds,
    part=st.sampled_from([2, 3, 4, 8]),
)
def test_goes_on_behind_a_full_block(seed, moodiness, drafts, threshold, part):
    """Eagerly, several blocks of a canvas in one forward, and no token of another."""
    model = moody(seed, moodiness)
    strategy = freedave(drafts=drafts, threshold=threshold, eager=True)
    tokens, forwards = decode(model, 8, strategy, part=part)
    wanted, most = followed(model, 8, threshold, part)
    assert tokens == wanted
    assert forwards <= most
    if moodiness == 0 and threshold > 1:
        assert forwards == 1 + -(-7 // drafts)


@given(seed=st.integers(0, 2**20), threshold=thresholds)
def test_room_for_branches_shows_neither_in_the_text_nor_in_its_steps(seed, threshold):
    model, source = moody(seed, 0.1), random.Random(seed)
    strategy = freedave(drafts=8, threshold=threshold)
    steps: list[int | None] = [None] * 8
    tokens, _ = decode(model, 8, strategy, lambda: source.randint(1, 8), steps)
    canvas: Canvas = (None,) * 8
    wanted: list[int | None] = [None] * 8
    number = 0
    while None in canvas:
        candidate, confidence = model(canvas)
        masked = [i for i, token in enumerate(canvas) if token is None]
        for i in step_of(masked, confidence, threshold):
            wanted[i] = number
            canvas = (*canvas[:i], candidate[i], *canvas[i + 1 :])
        number += 1
    assert (tokens, steps) == (canvas, wanted)


# -- one step -------------------------------------------------------------------


def random_branches(
    seed: int, rows: int = 5, count: int = 5, part: int | None = None
) -> Branches:
    """Rows at some point of a block; some branches were not evaluated."""
    source = random.Random(seed)
    parts = []
    for row in range(rows):
        model = moody(seed + row, source.choice([0.0, 0.1, 0.5]))
        canvas = tuple(source.choice([None, None, 1]) for _ in range(8))
        open_ = [i for i, token in enumerate(canvas) if token is None]
        candidate, confidence = model(canvas)
        open_.sort(key=lambda i: (-confidence[i], i))
        drafts = [
            (i, candidate[i] if source.random() < 0.9 else 0)
            for i in open_[: source.randint(0, 8)]
        ]
        made = evaluate(model, canvas, drafts, count, part)
        last = source.randint(1, count)
        made.masked[:, last:] = False
        if made.later is not None:
            made.later[:, last:] = False
        parts.append(made)
    return Branches(
        **{
            name: torch.cat([getattr(part, name) for part in parts])
            for name, value in vars(parts[0]).items()
            if value is not None
        }
    )


@given(
    seed=st.integers(0, 2**20),
    row_thresholds=st.lists(thresholds, min_size=5, max_size=5),
    part=st.sampled_from([None, 2, 3, 4]),
)
def test_agrees_with_a_row_wise_reading(seed, row_thresholds, part):
    """Rows with thresholds of their own, each as if it were alone."""
    branches = random_branches(seed, part=part)
    strategy = freedave()
    numbers = row_params(strategy, 5) | {"threshold": torch.tensor(row_thresholds)}
    decision = strategy.select(view_of(branches), numbers)
    for row, threshold in enumerate(row_thresholds):
        assert made(decision, row) == made_by_hand(branches, row, threshold)


@given(seed=st.integers(0, 2**20))
def test_a_view_of_some_rows_has_their_branches(seed):
    branches = random_branches(seed)
    whole = select(freedave(), view_of(branches))
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))[:3]
    part = view_of(branches).take(order.numpy(), 8)
    for row, other in enumerate(order.tolist()):
        assert made(select(freedave(), part), row) == made(whole, other)
    assert view_of(branches).take(order.numpy(), 6).branches.masked.shape == (3, 5, 6)


def alone(view: View) -> View:
    """The view of a forward without drafts."""
    return replace(
        view,
        branches=Branches(
            tokens=torch.zeros_like(view.candidate),
            rank=torch.full_like(view.candidate, NOT_DRAFTED),
            masked=view.masked[:, None],
            candidate=view.candidate[:, None],
            confidence=view.confidence[:, None],
        ),
    )


@given(seed=st.integers(0, 2**20), ties=st.booleans(), tau=st.floats(0.01, 2.0))
def test_without_drafts_it_is_static_or_a_threshold(seed, ties, tau):
    view = random_view(seed, ties=ties)
    view.scheduled.fill_(1)
    static = Static(StaticParams(), 8, CPU)
    assert chosen(freedave(drafts=1), alone(view)) == chosen(static, view)
    by_threshold = Threshold(ThresholdParams(threshold=tau), 8, CPU)
    assert chosen(freedave(threshold=tau), alone(view)) == chosen(by_threshold, view)


def test_worked_block():
    """C8: position 1 is written, the rest is drafted in order."""
    got = made(select(freedave(), alone(make_view([C8]))), 0)
    assert got.writes == {1: (1, 0)}
    assert [position for position, _ in got.drafts] == [5, 2, 4, 7, 3, 6]
    got = made(select(freedave(threshold=0.9), alone(make_view([C8]))), 0)
    assert sorted(got.writes) == [1, 5]


def test_a_row_without_masks_commits_nothing():
    view = alone(make_view([C8], torch.zeros(1, 8, dtype=torch.bool)))
    assert made(select(freedave(), view), 0) == Made({}, [])


def test_needs_branches():
    with pytest.raises(ValueError, match=r"needs View\.branches"):
        select(freedave(), make_view([C8]))


def test_refuses_caches_that_count_forwards():
    strategy = STRATEGIES["freedave"]
    for cache in ("none", "prefix", "dual"):
        strategy.validate(FreeDaveParams(), 8, replace(CPU, cache=cache))
    for cache in ("vicinity", "window"):
        with pytest.raises(ValueError, match="'none' or 'prefix' or 'dual'"):
            strategy.validate(FreeDaveParams(), 8, replace(CPU, cache=cache))
    # `dual` of a block model computes a sub-block, and the whole block at its borders.
    with pytest.raises(ValueError, match="set cache to 'none', or"):
        strategy.validate(
            FreeDaveParams(), 8, replace(CPU, cache="dual", attention="block")
        )


def test_registered_with_bounds():
    assert STRATEGIES["freedave"] is FreeDave
    assert FreeDaveParams().model_dump() == {
        "drafts": 4,
        "threshold": 2.0,
        "eager": False,
    }
    assert FreeDave.looks_ahead(FreeDaveParams(drafts=3)) == 0
    assert FreeDave.looks_ahead(FreeDaveParams(drafts=3, eager=True)) == 3
    assert numeric_fields(FreeDaveParams) == ["drafts", "threshold"]
    assert FreeDave.branches(FreeDaveParams(drafts=3)) == 3
    for bad in ({"drafts": 0}, {"drafts": 17}, {"threshold": 0.0}, {"threshold": 2.5}):
        with pytest.raises(ValidationError):
            FreeDaveParams(**bad)
