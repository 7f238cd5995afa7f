# SPDX-License-Identifier: Apache-2.0
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reference import rewriting_rules
from reference.views import CPU, chosen, make_view, random_view, select
from reference.walks import FIRST_TEXT, assert_agrees, assert_rows_alone, random_block

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.ass import Ass
from vllm_dlm.strategies.base import Params, numeric_fields
from vllm_dlm.strategies.eoser import Eoser, EoserParams
from vllm_dlm.strategies.static import Static, StaticParams

SCHEDULES = ("even", "doubling")
weights = st.fixed_dictionaries(
    {"first_weight": st.floats(0.0, 1.0), "last_weight": st.floats(0.0, 1.0)}
)


def eoser(width: int = 4, **params: Any) -> Eoser:
    return Eoser(EoserParams(**params), width, CPU)


def worked_view(step: int, steps: int = 8):
    """Positions 0 and 2 would end the text."""
    return make_view(
        [[0.90, 0.60, 0.95, 0.30]],
        torch.ones(1, 4, dtype=torch.bool),
        is_eos=torch.tensor([[True, False, True, False]]),
        step=torch.tensor([step]),
        steps=torch.tensor([steps]),
    )


@pytest.mark.parametrize(
    ("step", "steps", "position"),
    [
        (0, 8, 1),
        (2, 8, 1),  # .571: .543 is below .60
        (3, 8, 2),  # .657: .624 is not
        (7, 8, 2),
        (9, 8, 2),  # later than planned: no more than the last weight
        (0, 1, 2),  # a single step is the last
        (0, 2, 1),
    ],
)
def test_worked_block(step, steps, position):
    assert chosen(eoser(), worked_view(step, steps)) == [[position]]


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.0139),
        (1, 0.0216),
        (2, 0.0371),
        (3, 0.0680),
        (4, 0.1299),
        (5, 0.2536),
        (6, 0.5011),
        (7, 0.9961),
    ],
)
def test_weights_of_the_doubling_schedule(step, factor):
    """A token that ends the text loses to one of a little over `factor`."""
    block = torch.zeros(1, 256)
    block[0, 0] = 1.0
    is_eos = torch.zeros(1, 256, dtype=torch.bool)
    is_eos[0, 0] = True
    masked = torch.zeros(1, 256, dtype=torch.bool)
    masked[0, : 2**step + 1] = True  # one more than the step writes
    strategy = eoser(256, schedule="doubling")
    for other, loses in ((factor + 1e-4, True), (factor - 1e-4, False)):
        block[0, 1:] = other
        view = make_view(
            block,
            masked,
            is_eos=is_eos,
            step=torch.tensor([step]),
            state={"masks": torch.tensor([256])},
        )
        if step == 0:
            view.masked[:] = True
        commit = select(strategy, view).commit
        if step < 7:  # the last step writes all
            assert bool(commit[0, 0]) != loses
        else:
            assert bool(commit[0, 0])


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(
    seed=st.integers(0, 2**20),
    numbers=st.lists(weights, min_size=4, max_size=4),
)
def test_agrees_with_the_row_wise_reference(schedule, seed, numbers):
    view, probabilities = random_block(seed, width=8)
    eos_ids = range(FIRST_TEXT)
    rule = partial(rewriting_rules.eoser, eos_ids, schedule)
    strategy = eoser(8, schedule=schedule)
    assert_agrees(strategy, rule, view, probabilities, numbers)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(seed=st.integers(0, 2**20))
def test_other_rows_do_not_matter(schedule, seed):
    view, probabilities = random_block(seed, width=8)
    pairs = ((0.4, 1.0), (0.01, 1.0), (1.0, 0.0), (0.0, 0.5))
    numbers = [{"first_weight": a, "last_weight": b} for a, b in pairs]
    assert_rows_alone(eoser(8, schedule=schedule), view, probabilities, numbers)


@given(seed=st.integers(0, 2**20), ties=st.booleans())
def test_without_end_of_text_it_is_static_or_ass(seed, ties):
    view = random_view(seed, ties=ties)
    view.is_eos[:] = False
    assert chosen(eoser(8), view) == chosen(Static(StaticParams(), 8, CPU), view)
    view.step[:] = 0
    doubling = eoser(8, schedule="doubling")
    assert chosen(doubling, view) == chosen(Ass(Params(), 8, CPU), view)


@given(seed=st.integers(0, 2**20), ties=st.booleans())
def test_full_weights_change_nothing(seed, ties):
    view = random_view(seed, ties=ties)
    strategy = eoser(8, first_weight=1.0)
    assert chosen(strategy, view) == chosen(Static(StaticParams(), 8, CPU), view)


@pytest.mark.parametrize(
    ("given_", "first"),
    [
        ({}, 0.4),
        ({"schedule": "doubling"}, 0.01),
        ({"schedule": "doubling", "first_weight": 0.3}, 0.3),
        ({"first_weight": 0.2}, 0.2),
    ],
)
def test_the_first_weight_follows_the_schedule(given_, first):
    assert EoserParams(**given_).first_weight == first


def test_registered_with_bounds():
    assert STRATEGIES["eoser"] is Eoser
    assert Eoser.scope == "canvas"
    assert EoserParams().model_dump() == {
        "schedule": "even",
        "first_weight": 0.4,
        "last_weight": 1.0,
    }
    assert numeric_fields(EoserParams) == ["first_weight", "last_weight"]
    assert not eoser().state
    for bad in (
        {"schedule": "odd"},
        {"first_weight": -0.1},
        {"first_weight": 1.1},
        {"last_weight": 2.0},
        {"schedule": "doubling", "first_weight": None},
    ):
        with pytest.raises(ValidationError):
            EoserParams(**bad)
