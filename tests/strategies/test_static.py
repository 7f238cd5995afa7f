# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reference import procedures
from reference.views import (
    C8,
    CPU,
    assert_rows_independent,
    chosen,
    expected,
    make_view,
    random_view,
    take_rows,
)

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import numeric_fields
from vllm_dlm.strategies.static import Static, StaticParams

MODES = ("low_confidence", "random", "margin", "entropy", "left_to_right")


def static(mode: str = "low_confidence", width: int = 8) -> Static:
    return Static(StaticParams(mode=mode), width, CPU)


def test_worked_block():
    view = make_view([C8, C8, C8], scheduled=torch.tensor([1, 2, 9]))
    assert chosen(static(), view) == [[1], [1, 5], [1, 2, 3, 4, 5, 6, 7]]


def test_left_to_right_and_entropy():
    entropy = torch.tensor([[0.0, 0.3, 0.1, 0.2, 0.9, 0.1, 0.5, 0.4]])
    view = make_view([C8], scheduled=torch.tensor([3]), entropy=entropy)
    assert chosen(static("left_to_right"), view) == [[1, 2, 3]]
    assert chosen(static("entropy"), view) == [[2, 3, 5]]


@pytest.mark.parametrize("mode", MODES)
@given(seed=st.integers(0, 2**20), ties=st.booleans())
def test_agrees_with_the_row_wise_reference(mode, seed, ties):
    view = random_view(seed, ties=ties)
    rule = procedures.static(mode, random_scores=view.uniform)
    assert chosen(static(mode), view) == expected(rule, view)


@pytest.mark.parametrize("mode", MODES)
@given(seed=st.integers(0, 2**20))
def test_other_rows_do_not_matter(mode, seed):
    assert_rows_independent(static(mode), random_view(seed), seed)


@given(seed=st.integers(0, 2**20))
def test_ties_go_to_the_lowest_position(seed):
    view = random_view(seed)
    level = make_view(torch.full((5, 8), 0.5), view.masked, scheduled=view.scheduled)
    left = chosen(static("left_to_right"), level)
    assert chosen(static(), level) == left


@pytest.mark.parametrize(
    ("mode", "needs"),
    [
        ("low_confidence", set()),
        ("random", {"uniform"}),
        ("margin", {"margin"}),
        ("entropy", {"entropy"}),
        ("left_to_right", set()),
    ],
)
def test_asks_only_for_what_its_mode_reads(mode, needs):
    assert static(mode).needs == needs <= Static.needs


def test_registered_with_no_numeric_parameters():
    assert STRATEGIES["static"] is Static
    assert numeric_fields(StaticParams) == []
    with pytest.raises(ValidationError, match="low_confidence"):
        StaticParams(mode="loudest")
    view = take_rows(make_view([C8]), torch.tensor([0]))
    with pytest.raises(ValueError, match="needs View.margin"):
        chosen(static("margin"), view)
