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
    row_of,
    select,
)

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import numeric_fields
from vllm_dlm.strategies.hierarchy import Hierarchy, HierarchyParams, best_of_runs
from vllm_dlm.strategies.static import Static, StaticParams
from vllm_dlm.strategies.threshold import Threshold, ThresholdParams

# Any bound, and the confidences of views with ties.
bounds = st.floats(0.01, 2.0) | st.sampled_from([0.25**0.2, 0.5**0.2, 0.75**0.2, 1.0])


def hierarchy(
    tau: float = 0.9, low: float = 0.4, width: int = 8, remask: bool = False
) -> Hierarchy:
    params = HierarchyParams(threshold=tau, low_threshold=low, remask=remask)
    return Hierarchy(params, width, CPU)


def masks(pattern: str) -> torch.Tensor:
    """[1, B] bool of a picture: "." is masked."""
    return torch.tensor([[sign == "." for sign in pattern]])


@pytest.mark.parametrize(
    ("pattern", "tau", "low", "positions"),
    [
        ("#..#.#..", 0.9, 0.4, [1, 4, 7]),
        ("#..#.#..", 0.75, 0.4, [1, 2, 4, 7]),
        ("#..#.#..", 0.9, 0.77, [1, 4]),
        ("#.......", 0.9, 0.4, [1, 5]),
        ("########", 0.9, 0.4, []),
        # The picture in docs/strategies/hierarchy.md, step by step.
        ("##...#..", 0.9, 0.4, [2, 7]),
        ("###..#.#", 0.9, 0.4, [4]),
        ("###.##.#", 0.9, 0.4, [3]),
        ("######.#", 0.9, 0.4, [6]),  # .40 is not above .40, but the only one
    ],
)
def test_worked_block(pattern, tau, low, positions):
    view = make_view([C8], masks(pattern))
    assert chosen(hierarchy(tau, low), view) == [positions]


@pytest.mark.parametrize(
    ("low", "positions"), [(0.6, [1, 3]), (0.8, [1, 3]), (0.85, [1])]
)
def test_where_none_reaches_the_low_threshold_only_the_best_is_written(low, positions):
    view = make_view([[0.1, 0.8, 0.1, 0.7]], masks("..#."))
    assert chosen(hierarchy(0.65, low, width=4), view) == [positions]


def test_of_equal_positions_a_run_takes_the_leftmost():
    view = make_view([[0.6, 0.6, 0.9, 0.5, 0.7, 0.7, 0.9, 0.6]], masks("..#...#."))
    assert best_of_runs(view)[0].nonzero()[:, 0].tolist() == [0, 4, 7]


def test_a_row_without_masks_has_no_runs():
    view = make_view([C8], masks("########"))
    assert not best_of_runs(view).any()


def test_each_row_has_its_own_numbers():
    params = {
        "threshold": torch.tensor([0.9, 0.75, 0.9]),
        "low_threshold": torch.tensor([0.4, 0.4, 0.77]),
    }
    view = make_view([C8] * 3, masks("#..#.#..").repeat(3, 1))
    commit = hierarchy().select(view, params).commit
    assert [row.nonzero()[:, 0].tolist() for row in commit] == [
        [1, 4, 7],
        [1, 2, 4, 7],
        [1, 4],
    ]


@given(
    seed=st.integers(0, 2**20),
    ties=st.booleans(),
    tau=bounds,
    low=bounds | st.just(0.0),
)
def test_agrees_with_the_row_wise_reference(seed, ties, tau, low):
    view = random_view(seed, ties=ties)
    rule = place_rules.hierarchy(tau, low)
    assert chosen(hierarchy(tau, low), view) == expected(rule, view)


@given(seed=st.integers(0, 2**20), ties=st.booleans())
def test_other_rows_do_not_matter(seed, ties):
    view = random_view(seed, ties=ties)
    for remask in (False, True):
        assert_rows_independent(hierarchy(remask=remask), view, seed)


@given(seed=st.integers(0, 2**20), ties=st.booleans(), tau=bounds)
def test_with_equal_thresholds_it_is_strict_threshold(seed, ties, tau):
    view = random_view(seed, ties=ties)
    strict = Threshold(ThresholdParams(threshold=tau, strict=True), 8, CPU)
    assert chosen(hierarchy(tau, tau), view) == chosen(strict, view)


@given(seed=st.integers(0, 2**20), ties=st.booleans(), tau=bounds)
def test_with_a_low_threshold_above_one_it_is_static(seed, ties, tau):
    view = random_view(seed, ties=ties)
    view.scheduled.fill_(1)
    static = Static(StaticParams(), 8, CPU)
    assert chosen(hierarchy(tau, 1.5), view) == chosen(static, view)


@given(seed=st.integers(0, 2**20))
def test_with_extreme_thresholds_each_run_gives_one(seed):
    view = random_view(seed)
    commit = [set(row) for row in chosen(hierarchy(1.0, 0.0), view)]
    for masked, written in zip(view.masked.tolist(), commit, strict=True):
        picture = "".join("." if here else "#" for here in masked)
        assert len(written) == len(picture.replace("#", " ").split())


# -- remask ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "confidence", "written", "taken_back"),
    [
        ("#..#.#..", C8, [1, 4, 7], []),
        # One doubtful token, and two are written anyhow.
        ("#.#.", [0.9, 0.8, 0.3, 0.7], [1, 3], [2]),
        ("##...#..", [*C8[:5], 0.3, *C8[6:]], [2, 7], [5]),
        # As many are written as are taken back, and one more.
        ("#...##", [0.9, 0.8, 0.3, 0.7, 0.2, 0.1], [1, 2, 3], [4, 5]),
        # Not enough masks: the least sure one only.
        ("#..##", [0.3, 0.8, 0.7, 0.1, 0.2], [1, 2], [3]),
        ("#.##", [0.3, 0.8, 0.1, 0.2], [1], []),
        ("####", [0.3, 0.3, 0.1, 0.2], [], []),
    ],
)
def test_doubtful_tokens_are_taken_back(pattern, confidence, written, taken_back):
    view = make_view([confidence], masks(pattern))
    decision = select(hierarchy(width=len(pattern), remask=True), view)
    assert decision.commit[0].nonzero()[:, 0].tolist() == written
    assert decision.remask[0].nonzero()[:, 0].tolist() == taken_back


def test_the_prompts_tokens_are_not_taken_back():
    view = make_view([[0.1, 0.9, 0.2, 0.9]], masks("#.#."))
    view.decided[0, 0] = False
    remask = select(hierarchy(width=4, remask=True), view).remask
    assert remask.tolist() == [[False, False, True, False]]


@given(seed=st.integers(0, 2**20), ties=st.booleans(), tau=bounds, low=bounds)
def test_remask_agrees_with_the_row_wise_reference(seed, ties, tau, low):
    view = random_view(seed, ties=ties)
    decision = select(hierarchy(tau, low, remask=True), view)
    rule = place_rules.hierarchy(tau, low, remask=True)
    for row in range(view.masked.shape[0]):
        wanted = rule.step(row_of(view, row))
        assert decision.commit[row].nonzero()[:, 0].tolist() == wanted.commit
        assert decision.remask[row].nonzero()[:, 0].tolist() == wanted.remask


@given(seed=st.integers(0, 2**20), low=bounds)
def test_every_step_gains_a_token(seed, low):
    strategy = hierarchy(low=low, remask=True)
    masked = torch.ones(5, 8, dtype=torch.bool)
    for step in range(8):
        view = random_view(seed + step)
        view = make_view(view.confidence, masked)
        decision = select(strategy, view)
        assert not (decision.commit & ~masked).any()
        assert not (decision.remask & masked).any()
        left = (masked & ~decision.commit) | decision.remask
        gained = masked.sum(dim=1) - left.sum(dim=1)
        assert (gained >= masked.any(dim=1).long()).all()
        masked = left
    assert not masked.any()


def test_declares_to_rewrite_where_it_does():
    assert not hierarchy().may_rewrite and hierarchy(remask=True).may_rewrite
    assert select(hierarchy(), make_view([C8])).remask is None


def test_registered_with_bounds():
    assert STRATEGIES["hierarchy"] is Hierarchy
    assert HierarchyParams().model_dump() == {
        "threshold": 0.8,
        "low_threshold": 0.5,
        "remask": False,
    }
    assert numeric_fields(HierarchyParams) == ["threshold", "low_threshold"]
    for bad in (
        {"threshold": 0.0},
        {"threshold": 2.5},
        {"low_threshold": -0.1},
        {"low_threshold": 2.5},
    ):
        with pytest.raises(ValidationError):
            HierarchyParams(**bad)
