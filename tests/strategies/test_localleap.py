# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reference import place_rules
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
from vllm_dlm.strategies.localleap import LocalLeap, LocalLeapParams, distance_to
from vllm_dlm.strategies.threshold import Threshold, ThresholdParams

# Any bound, and the confidences of views with ties.
bounds = st.floats(0.01, 2.0) | st.sampled_from([0.25**0.2, 0.5**0.2, 0.75**0.2, 1.0])


def localleap(
    tau: float = 0.9, relaxed: float = 0.75, radius: int = 4, width: int = 8
) -> LocalLeap:
    params = LocalLeapParams(threshold=tau, relaxed_threshold=relaxed, radius=radius)
    return LocalLeap(params, width, CPU)


def threshold(tau: float) -> Threshold:
    return Threshold(ThresholdParams(threshold=tau), 8, CPU)


@pytest.mark.parametrize(
    ("tau", "radius", "positions"),
    [
        (0.9, 1, [1, 2, 4, 5]),
        (0.9, 2, [1, 2, 4, 5, 7]),
        (0.9, 4, [1, 2, 4, 5, 7]),
        (0.95, 1, [1, 2]),
        (0.98, 4, [1]),  # no anchor
    ],
)
def test_worked_block(tau, radius, positions):
    assert chosen(localleap(tau, 0.75, radius), make_view([C8])) == [positions]


def test_only_masks_are_anchors():
    # Position 0 is sure, but written already: the .8 beside it stays.
    view = make_view([[0.99, 0.8, 0.5, 0.85]])
    assert chosen(localleap(width=4), view) == [[3]]


def test_each_row_has_its_own_numbers():
    params = {
        "threshold": torch.tensor([0.9, 0.9, 0.98, 0.9]),
        "relaxed_threshold": torch.tensor([0.75, 0.75, 0.75, 0.5]),
        "radius": torch.tensor([1, 4, 4, 1_000_000]),
    }
    commit = localleap().select(make_view([C8] * 4), params).commit
    assert [row.nonzero()[:, 0].tolist() for row in commit] == [
        [1, 2, 4, 5],
        [1, 2, 4, 5, 7],
        [1],
        [1, 2, 3, 4, 5, 7],
    ]


def test_distance():
    marked = torch.tensor([[0, 1, 0, 0, 0, 1, 0], [0] * 7, [1] * 7]).bool()
    assert distance_to(marked).tolist() == [
        [1, 0, 1, 2, 1, 0, 1],
        [torch.inf] * 7,
        [0] * 7,
    ]


@given(
    seed=st.integers(0, 2**20),
    ties=st.booleans(),
    tau=bounds,
    relaxed=bounds,
    radius=st.integers(0, 9),
)
def test_agrees_with_the_row_wise_reference(seed, ties, tau, relaxed, radius):
    view = random_view(seed, ties=ties)
    rule = place_rules.localleap(tau, relaxed, radius)
    assert chosen(localleap(tau, relaxed, radius), view) == expected(rule, view)


@given(seed=st.integers(0, 2**20), ties=st.booleans(), radius=st.integers(0, 9))
def test_other_rows_do_not_matter(seed, ties, radius):
    strategy = localleap(radius=radius)
    assert_rows_independent(strategy, random_view(seed, ties=ties), seed)


@given(seed=st.integers(0, 2**20), ties=st.booleans(), tau=bounds, relaxed=bounds)
def test_is_threshold_where_anchors_relax_nothing(seed, ties, tau, relaxed):
    view = random_view(seed, ties=ties)
    plain = chosen(threshold(tau), view)
    assert chosen(localleap(tau, relaxed, 0), view) == plain
    assert chosen(localleap(tau, tau, 4), view) == plain
    assert chosen(localleap(tau, max(tau, relaxed), 4), view) == plain


@given(seed=st.integers(0, 2**20), ties=st.booleans(), tau=bounds)
def test_a_wide_anchor_relaxes_the_whole_block(seed, ties, tau):
    view = random_view(seed, ties=ties)
    strict, relaxed = chosen(threshold(tau), view), chosen(threshold(0.6), view)
    least = torch.tensor(tau, dtype=torch.float32)
    anchored = (view.masked & (view.confidence >= least)).any(dim=1).tolist()
    wanted = [
        sorted({*all_sure, *best}) if has_anchor else best
        for all_sure, best, has_anchor in zip(relaxed, strict, anchored, strict=True)
    ]
    assert chosen(localleap(tau, 0.6, 8), view) == wanted


def test_a_row_without_masks_commits_nothing():
    view = make_view([C8, C8], torch.tensor([[False] * 8, [True] * 8]))
    assert chosen(localleap(radius=1), view) == [[], [0, 1, 2, 4, 5]]


def test_registered_with_bounds():
    assert STRATEGIES["localleap"] is LocalLeap
    assert LocalLeapParams().model_dump() == {
        "threshold": 0.9,
        "relaxed_threshold": 0.75,
        "radius": 4,
    }
    assert numeric_fields(LocalLeapParams) == [*LocalLeapParams().model_dump()]
    for bad in (
        {"threshold": 0.0},
        {"threshold": 2.5},
        {"relaxed_threshold": 0.0},
        {"relaxed_threshold": 2.5},
        {"radius": -1},
        {"radius": 1.5},
        {"radius": 1_000_001},
    ):
        with pytest.raises(ValidationError):
            LocalLeapParams(**bad)
