# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reference.rewriting_rules import ete as rule
from reference.views import CPU, chosen, expected, make_view, random_view
from reference.walks import assert_agrees, assert_rows_alone, random_block

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import View, numeric_fields
from vllm_dlm.strategies.ete import Ete, EteParams

# The active window of 4, and the next one.
ACTIVE = [0.97, 0.60, 0.35, 0.92]
NEXT = [0.95, 0.91, 0.50, 0.20]
numbers = st.fixed_dictionaries(
    {
        "threshold": st.floats(0.05, 1.2),
        "window": st.integers(1, 9),
        "ahead": st.integers(1, 4),
        "fewest_bits": st.floats(0.0, 3.0),
        "fewest_tokens": st.integers(0, 4),
    }
)


def ete(width: int = 8, **params: Any) -> Ete:
    return Ete(EteParams(**params), width, CPU)


def worked_view(confidence: list[float], **changes: Any) -> View:
    """All masked; the less sure, the more entropy."""
    row = torch.tensor([confidence])
    masked = torch.ones_like(row, dtype=torch.bool)
    return make_view(row, masked, entropy=2 * (1 - row), **changes)


@pytest.mark.parametrize(
    ("params", "positions"),
    [
        # .374 bits are less than 1: position 2 as well, which tells 1.515.
        ({}, [0, 2, 3, 4, 5]),
        ({"fewest_bits": 0.3}, [0, 3, 4, 5]),
        ({"fewest_bits": 0.3, "fewest_tokens": 5}, [0, 2, 3, 4, 5]),
        ({"threshold": 0.96, "fewest_bits": 0.0, "fewest_tokens": 0}, [0]),
        ({"threshold": 0.98}, [2]),
        # Nothing asked for: the best of the active window.
        ({"threshold": 0.98, "fewest_bits": 0.0, "fewest_tokens": 0}, [0]),
    ],
)
def test_worked_windows(params, positions):
    view = worked_view([*ACTIVE, *NEXT])
    assert chosen(ete(window=4, **params), view) == [positions]


def test_windows_are_of_the_output():
    """The fourth window begins at position 6; `ahead` counts windows from there."""
    confidence = [0.5, 0.6, 0.95, 0.95, 0.95, 0.95, 0.95, 0.95]
    view = worked_view(confidence, positions=torch.arange(5, 13)[None])
    # 5 | 6 7 | 8 9 | 10 11 | 12
    params = {"window": 2, "fewest_bits": 0.0, "fewest_tokens": 0}
    assert chosen(ete(**params), view) == [[2]]
    assert chosen(ete(**params, ahead=2), view) == [[2, 3, 4]]
    assert chosen(ete(**params, ahead=4), view) == [[2, 3, 4, 5, 6, 7]]


def test_explores_nothing_where_all_is_sure():
    view = worked_view([0.99, 0.98, 0.97, 0.96, 0.1, 0.1, 0.1, 0.1])
    assert chosen(ete(window=4), view) == [[0, 1, 2, 3]]


def test_a_row_without_masks_commits_nothing():
    view = worked_view([*ACTIVE, *NEXT])
    view.masked[:] = False
    assert chosen(ete(window=4), view) == [[]]


@given(seed=st.integers(0, 2**20), ties=st.booleans(), row=numbers)
def test_agrees_with_the_row_wise_reference(seed, ties, row):
    view = random_view(seed, ties=ties)
    assert chosen(ete(**row), view) == expected(rule(**row), view)


@given(
    seed=st.integers(0, 2**20),
    rows=st.lists(numbers, min_size=4, max_size=4),
)
def test_agrees_on_whole_canvases(seed, rows):
    view, probabilities = random_block(seed)
    assert_agrees(ete(6), rule, view, probabilities, rows)


@given(
    seed=st.integers(0, 2**20),
    rows=st.lists(numbers, min_size=4, max_size=4),
)
def test_other_rows_do_not_matter(seed, rows):
    view, probabilities = random_block(seed)
    assert_rows_alone(ete(6), view, probabilities, rows)


def test_says_that_it_is_a_reconstruction():
    assert "reconstruct" in Ete.paper and "reconstruction" in Ete.summary


def test_registered_with_bounds():
    assert STRATEGIES["ete"] is Ete
    assert Ete.scope == "canvas" and Ete.needs == {"entropy"}
    assert EteParams().model_dump() == {
        "threshold": 0.9,
        "window": 32,
        "ahead": 1,
        "fewest_bits": 1.0,
        "fewest_tokens": 2,
    }
    assert numeric_fields(EteParams) == list(EteParams.model_fields)
    for bad in (
        {"threshold": 0.0},
        {"threshold": 2.5},
        {"window": 0},
        {"ahead": 0},
        {"ahead": 5},
        {"fewest_bits": -0.1},
        {"fewest_tokens": -1},
    ):
        with pytest.raises(ValidationError):
            EteParams(**bad)
