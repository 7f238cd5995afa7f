# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reference.rewriting_rules import joint as rule
from reference.views import (
    CPU,
    MASK_ID,
    chosen,
    make_view,
    random_view,
    select,
    with_probabilities,
)
from reference.walks import assert_agrees, assert_rows_alone, random_block

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import View, numeric_fields
from vllm_dlm.strategies.joint import Joint, JointParams
from vllm_dlm.strategies.threshold import Threshold, ThresholdParams

bounds = st.floats(0.0, 1.2) | st.sampled_from([0.0, 0.25**0.2, 0.5**0.2])
NUMBERS = ("mask_threshold", "edit_threshold", "max_post_steps")


def joint(width: int = 5, **params: Any) -> Joint:
    return Joint(JointParams(**params), width, CPU)


def worked_view() -> View:
    masked = torch.tensor([[True, False, False, True, False]])
    return make_view(
        [[0.72, 0.99, 0.65, 0.40, 0.30]],
        masked,
        tokens=torch.tensor([[MASK_ID, 5, 7, MASK_ID, 9]]),
        candidate=torch.tensor([[3, 5, 8, 4, 2]]),
    )


def places(mask: torch.Tensor | None) -> list[int]:
    return [] if mask is None else mask[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("params", "written", "edited"),
    [
        ({}, [0], [2]),
        ({"preset": "speed"}, [0], [2, 4]),
        ({"edit": False}, [0], []),
        ({"mask_threshold": 0.9}, [0], [2]),  # none is sure: the best one
        ({"mask_threshold": 0.3, "edit_threshold": 0.65}, [0, 3], []),
    ],
)
def test_worked_block(params, written, edited):
    decision = select(joint(**params), worked_view())
    assert (places(decision.commit), places(decision.edit)) == (written, edited)


def test_the_prompts_tokens_are_not_edited():
    view = worked_view()
    view.decided[0, 2] = False
    view.positions[0] = torch.arange(-3, 2)
    assert places(select(joint(), view).edit) == []


def full_block(view: View, candidate: list[int], post_steps: int) -> View:
    """The view without masks, after `post_steps` steps that began so."""
    nothing = torch.zeros_like(view.masked)
    return replace(
        view,
        tokens=torch.tensor([[3, 5, 7, 4, 9]]),
        candidate=torch.tensor([candidate]),
        masked=nothing,
        decided=~nothing,
        state={"post_steps": torch.tensor([post_steps])},
    )


@pytest.mark.parametrize(
    ("candidate", "post_steps", "max_post_steps", "hold"),
    [
        ([3, 5, 8, 4, 9], 0, 16, True),
        ([3, 5, 7, 4, 9], 0, 16, False),  # nothing to change
        ([3, 5, 7, 4, 2], 0, 16, False),  # .30 is not above .5
        ([3, 5, 8, 4, 9], 14, 16, True),
        ([3, 5, 8, 4, 9], 15, 16, False),
        ([3, 5, 8, 4, 9], 0, 1, False),
    ],
)
def test_a_full_block_stays_open_while_it_changes(
    candidate, post_steps, max_post_steps, hold
):
    strategy = joint(max_post_steps=max_post_steps)
    view = full_block(worked_view(), candidate, post_steps)
    decision = select(strategy, view)
    assert decision.hold.tolist() == [hold]
    assert decision.state["post_steps"].tolist() == [post_steps + 1]


@pytest.mark.parametrize(
    ("max_post_steps", "hold"), [(16, True), (1, True), (0, False)]
)
def test_the_last_mask_opens_the_edits(max_post_steps, hold):
    view = worked_view()
    strategy = joint(mask_threshold=0.3, max_post_steps=max_post_steps)
    assert select(strategy, view).hold.tolist() == [hold]
    # A mask of another part of the block: it is not full.
    view = replace(view, masked=view.masked & (view.positions < 3))
    assert select(strategy, view).hold.tolist() == [False]


def test_edits_back_and_forth_come_to_an_end():
    """Two positions that each want to be what the other is, forever."""
    view = worked_view()
    held = 0
    view = full_block(view, [3, 5, 8, 4, 9], 0)
    while True:
        decision = select(joint(max_post_steps=5), view)
        if not decision.hold.any():
            break
        held += 1
        tokens = torch.where(decision.edit, view.candidate, view.tokens)
        view = replace(view, tokens=tokens, candidate=view.tokens, state=decision.state)
    assert held + 1 == 5  # forwards


@given(
    seed=st.integers(0, 2**20),
    numbers=st.lists(
        st.tuples(bounds, bounds, st.integers(0, 4)), min_size=4, max_size=4
    ),
)
def test_agrees_with_the_row_wise_reference(seed, numbers):
    view, probabilities = random_block(seed)
    probabilities = torch.cat([probabilities, probabilities.flip(0)])
    rows = [dict(zip(NUMBERS, row, strict=True)) for row in numbers]
    assert_agrees(joint(6), rule, view, probabilities, rows)


@given(
    seed=st.integers(0, 2**20),
    penalty=st.sampled_from([0.3, 3.0, 50.0]),
    numbers=st.tuples(bounds, bounds, st.integers(0, 4)),
)
def test_the_penalty_lowers_the_token_to_the_left(seed, penalty, numbers):
    view, probabilities = random_block(seed)
    view = replace(view, tokens=view.tokens % 12)
    probabilities = torch.cat([probabilities, probabilities.flip(0)])
    rows = [dict(zip(NUMBERS, numbers, strict=True))] * 4
    penalised = partial(rule, penalty=penalty)
    assert_agrees(joint(6, penalty=penalty), penalised, view, probabilities, rows)


def test_a_stutter():
    """B follows B: at 3 it gives way to C; a mask and the block's left say nothing."""
    p = torch.tensor([[[0.1, 0.6, 0.3], [0.1, 0.6, 0.3], [0.1, 0.6, 0.3]]])
    tokens = torch.tensor([[1, MASK_ID, MASK_ID]])
    masked = tokens == MASK_ID
    view = make_view([[0.0] * 3], masked, tokens=tokens)
    view = with_probabilities(view, p)
    decision = select(joint(3, penalty=3.0), view)
    # 0.6 e^-3 = .0299, of .4299 in all: C has .6979, and not the whole .7.
    assert places(decision.commit) == [1]
    assert decision.new_tokens.tolist() == [[1, 2, 1]]
    mild = select(joint(3, penalty=0.1, mask_threshold=0.58), view)
    # 0.6 e^-.1 = .5429, of .9429: .5758 is not above .58, but .6 is.
    assert places(mild.commit) == [2]
    assert joint(3, penalty=3.0).needs == {"probabilities"} == Joint.needs
    assert joint(3).needs == set()


@given(seed=st.integers(0, 2**20))
def test_other_rows_do_not_matter(seed):
    view, probabilities = random_block(seed)
    probabilities = torch.cat([probabilities, probabilities.flip(0)])
    rows = [
        dict(zip(NUMBERS, row, strict=True))
        for row in ((0.7, 0.5, 4), (0.5, 0.0, 2), (0.3, 0.9, 0), (1.1, 0.3, 1))
    ]
    assert_rows_alone(joint(6), view, probabilities, rows)


@given(seed=st.integers(0, 2**20), ties=st.booleans(), tau=st.floats(0.01, 2.0))
def test_without_edits_it_is_a_strict_threshold(seed, ties, tau):
    view = random_view(seed, ties=ties)
    plain = joint(8, edit=False, mask_threshold=tau)
    strict = Threshold(ThresholdParams(threshold=tau, strict=True), 8, CPU)
    assert chosen(plain, view) == chosen(strict, view)
    assert not plain.may_rewrite and not plain.state
    assert plain.step_limit(plain.params) == strict.step_limit(strict.params)


def test_time_for_every_edit():
    """A block of 5 that is filled one by one, and then edited 16 times."""
    strategy = joint()
    assert strategy.step_limit(JointParams(max_post_steps=16)) > 5 + 16
    # Of the request, not of the group's first.
    assert strategy.step_limit(JointParams(max_post_steps=0)) == 11


@pytest.mark.parametrize(
    ("given_", "thresholds"),
    [
        ({}, (0.7, 0.5)),
        ({"preset": "default"}, (0.7, 0.5)),
        ({"preset": "quality"}, (0.7, 0.5)),
        ({"preset": "speed"}, (0.5, 0.0)),
        ({"preset": "speed", "edit_threshold": 0.2}, (0.5, 0.2)),
        ({"mask_threshold": 0.6}, (0.6, 0.5)),
    ],
)
def test_presets(given_, thresholds):
    params = JointParams(**given_)
    assert (params.mask_threshold, params.edit_threshold) == thresholds


def test_registered_with_bounds():
    assert STRATEGIES["joint"] is Joint
    assert JointParams().model_dump() == {
        "mask_threshold": 0.7,
        "edit_threshold": 0.5,
        "edit": True,
        "penalty": None,
        "max_post_steps": 16,
    }
    assert tuple(numeric_fields(JointParams)) == NUMBERS
    for bad in (
        {"preset": "fast"},
        {"preset": ["speed"]},
        {"mask_threshold": -0.1},
        {"mask_threshold": 2.5},
        {"edit_threshold": -0.1},
        {"edit_threshold": None},
        {"max_post_steps": -1},
        {"max_post_steps": 65},
        {"penalty": 0.0},
        {"penalty": True},
        {"penalty": 101.0},
    ):
        with pytest.raises(ValidationError):
            JointParams(**bad)
