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
)

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import numeric_fields
from vllm_dlm.strategies.factor import Factor, FactorParams


def factor(value: float, width: int = 8) -> Factor:
    return Factor(FactorParams(factor=value), width, CPU)


@pytest.mark.parametrize(
    ("value", "positions"),
    [(0.5, [1, 5]), (1.0, [1, 2, 5]), (1.2, [1, 2, 4, 5])],
)
def test_worked_block(value, positions):
    assert chosen(factor(value), make_view([C8])) == [positions]


def test_only_the_last_candidate_fails():
    # The published loop would write it as well.
    view = make_view([[0.9, 0.99, 0.99, 0.1]])
    assert chosen(factor(1.0, 4), view) == [[1, 2]]


def test_the_first_needs_no_certainty():
    assert chosen(factor(0.01, 4), make_view([[0.9, 0.1, 0.3, 0.2]])) == [[2]]


def test_each_row_has_its_own_factor():
    params = {"factor": torch.tensor([0.5, 1.2, 100.0])}
    commit = factor(1.0).select(make_view([C8, C8, C8]), params).commit
    assert commit.sum(dim=1).tolist() == [2, 4, 7]


@given(
    seed=st.integers(0, 2**20),
    ties=st.booleans(),
    value=st.floats(0.125, 12.0, width=32),
)
def test_agrees_with_the_row_wise_reference(seed, ties, value):
    view = random_view(seed, ties=ties)
    assert chosen(factor(value), view) == expected(procedures.factor(value), view)


@given(seed=st.integers(0, 2**20))
def test_other_rows_do_not_matter(seed):
    assert_rows_independent(factor(1.0), random_view(seed), seed)


def test_a_row_without_masks_commits_nothing():
    view = make_view([C8], torch.zeros(1, 8, dtype=torch.bool))
    assert chosen(factor(1.0), view) == [[]]


def test_registered_with_bounds():
    assert STRATEGIES["factor"] is Factor
    assert numeric_fields(FactorParams) == ["factor"]
    assert FactorParams().factor == 1.0
    with pytest.raises(ValidationError):
        FactorParams(factor=0.0)
