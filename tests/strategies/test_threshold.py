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
from vllm_dlm.strategies.static import Static, StaticParams
from vllm_dlm.strategies.threshold import Threshold, ThresholdParams


def threshold(tau: float, width: int = 8) -> Threshold:
    return Threshold(ThresholdParams(threshold=tau), width, CPU)


@pytest.mark.parametrize(
    ("tau", "positions"), [(0.9, [1, 5]), (0.98, [1]), (0.4, [1, 2, 3, 4, 5, 6, 7])]
)
def test_worked_block(tau, positions):
    assert chosen(threshold(tau), make_view([C8])) == [positions]


def test_each_row_has_its_own_threshold():
    view = make_view([C8, C8])
    params = {"threshold": torch.tensor([0.9, 0.98])}
    commit = threshold(0.5).select(view, params).commit
    assert [row.nonzero()[:, 0].tolist() for row in commit] == [[1, 5], [1]]


@given(
    seed=st.integers(0, 2**20),
    ties=st.booleans(),
    tau=st.floats(0.01, 2.0) | st.just(0.75),
)
def test_agrees_with_the_row_wise_reference(seed, ties, tau):
    view = random_view(seed, ties=ties)
    assert chosen(threshold(tau), view) == expected(procedures.threshold(tau), view)


@given(seed=st.integers(0, 2**20))
def test_other_rows_do_not_matter(seed):
    assert_rows_independent(threshold(0.8), random_view(seed), seed)


@given(
    seed=st.integers(0, 2**20),
    ties=st.booleans(),
    tau=st.floats(1.0, 2.0, exclude_min=True, width=32),
)
def test_above_one_it_is_static_with_one_token_a_step(seed, ties, tau):
    view = random_view(seed, ties=ties)
    view.scheduled.fill_(1)
    static = Static(StaticParams(), 8, CPU)
    assert chosen(threshold(tau), view) == chosen(static, view)


def test_a_row_without_masks_commits_nothing():
    view = make_view([C8, C8], torch.tensor([[False] * 8, [True] * 8]))
    assert chosen(threshold(0.9), view) == [[], [0, 1, 5]]


def test_registered_with_bounds():
    assert STRATEGIES["threshold"] is Threshold
    assert numeric_fields(ThresholdParams) == ["threshold"]
    assert ThresholdParams().threshold == 0.9
    for bad in (0.0, 2.5, float("nan")):
        with pytest.raises(ValidationError):
            ThresholdParams(threshold=bad)
