# SPDX-License-Identifier: Apache-2.0
from typing import Any

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


def threshold(tau: float, width: int = 8, **more: Any) -> Threshold:
    return Threshold(ThresholdParams(threshold=tau, **more), width, CPU)


@pytest.mark.parametrize(
    ("tau", "positions"), [(0.9, [1, 5]), (0.98, [1]), (0.4, [1, 2, 3, 4, 5, 6, 7])]
)
def test_worked_block(tau, positions):
    assert chosen(threshold(tau), make_view([C8])) == [positions]


@pytest.mark.parametrize(
    ("tau", "strict", "scheduled", "positions"),
    [
        (0.93, False, None, [1, 5]),
        (0.93, True, None, [1]),
        (0.97, True, None, [1]),  # none is above: the best one
        (0.9, False, 1, [1, 5]),  # enough are sure
        (0.9, False, 2, [1, 5]),
        (0.9, False, 3, [1, 2, 5]),  # too few: the three best
        (0.98, True, 2, [1, 5]),
        (0.5, True, 9, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_forms_of_later_models(tau, strict, scheduled, positions):
    more = {"strict": strict}
    view = make_view([C8])
    if scheduled is not None:
        more["at_least"] = "scheduled"
        view.scheduled.fill_(scheduled)
    assert chosen(threshold(tau, **more), view) == [positions]


def test_each_row_has_its_own_threshold():
    view = make_view([C8, C8])
    params = {"threshold": torch.tensor([0.9, 0.98])}
    commit = threshold(0.5).select(view, params).commit
    assert [row.nonzero()[:, 0].tolist() for row in commit] == [[1, 5], [1]]


@given(
    seed=st.integers(0, 2**20),
    ties=st.booleans(),
    tau=st.floats(0.01, 2.0) | st.just(0.75**0.2),  # a confidence that ties have
    strict=st.booleans(),
    at_least=st.sampled_from(["best", "scheduled"]),
)
def test_agrees_with_the_row_wise_reference(seed, ties, tau, strict, at_least):
    view = random_view(seed, ties=ties)
    rule = procedures.threshold(tau, strict, at_least)
    strategy = threshold(tau, strict=strict, at_least=at_least)
    assert chosen(strategy, view) == expected(rule, view)


@given(seed=st.integers(0, 2**20), at_least=st.sampled_from(["best", "scheduled"]))
def test_other_rows_do_not_matter(seed, at_least):
    strategy = threshold(0.8, at_least=at_least)
    assert_rows_independent(strategy, random_view(seed), seed)


@given(
    seed=st.integers(0, 2**20),
    ties=st.booleans(),
    tau=st.floats(1.0, 2.0, exclude_min=True, width=32),
)
def test_above_one_it_is_static(seed, ties, tau):
    view = random_view(seed, ties=ties)
    static = Static(StaticParams(), 8, CPU)
    by_schedule = threshold(tau, at_least="scheduled")
    assert chosen(by_schedule, view) == chosen(static, view)
    view.scheduled.fill_(1)
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
