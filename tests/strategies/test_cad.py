# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reference import rules
from reference.views import (
    C8,
    CPU,
    H8,
    assert_rows_independent,
    chosen,
    expected,
    make_view,
    random_view,
)

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import numeric_fields
from vllm_dlm.strategies.cad import Cad, CadParams
from vllm_dlm.strategies.entropy import Entropy, EntropyParams
from vllm_dlm.strategies.static import Static, StaticParams
from vllm_dlm.strategies.threshold import Threshold, ThresholdParams

MODES = ("confidence", "entropy")


def cad(**params: Any) -> Cad:
    return Cad(CadParams(**{"threshold": 0.8, "most": 4, **params}), 8, CPU)


@pytest.mark.parametrize(
    ("threshold", "fewest", "most", "positions"),
    [
        (0.95, 1, 4, [1]),
        (0.75, 1, 4, [1, 2, 4, 5]),
        (0.75, 1, 32, [1, 2, 4, 5, 7]),
        (0.75, 1, 1, [1]),
        (0.95, 3, 4, [1, 2, 5]),
        (0.95, 9, 9, [1, 2, 3, 4, 5, 6, 7]),
        (1.5, 2, 4, [1, 5]),
    ],
)
def test_worked_block(threshold, fewest, most, positions):
    strategy = cad(threshold=threshold, fewest=fewest, most=most)
    assert chosen(strategy, make_view([C8])) == [positions]


@pytest.mark.parametrize(
    ("threshold", "positions"),
    [(0.1, [1]), (0.3, [1, 5]), (0.55, [1, 4, 5]), (1.0, [1, 2, 4, 5])],
)
def test_by_entropy(threshold, positions):
    view = make_view([C8], entropy=torch.tensor([H8]))
    assert chosen(cad(mode="entropy", entropy_threshold=threshold), view) == [positions]


def ends_at(*positions: int, progress: float) -> dict[str, torch.Tensor]:
    """Changes to the worked block: where a token ends the text, and how much is."""
    is_eos = torch.zeros(1, 8, dtype=torch.bool)
    is_eos[0, list(positions)] = True
    return {"is_eos": is_eos, "progress": torch.tensor([progress])}


@pytest.mark.parametrize(
    ("params", "eos", "progress", "positions"),
    [
        ({"threshold": 0.95}, [1], 0.29, [5]),
        ({"threshold": 0.95}, [1], 0.3, [1]),
        ({"threshold": 0.75}, [1, 4], 0.0, [2, 5, 7]),
        ({"threshold": 0.95, "fewest": 3}, [1, 5], 0.1, [2, 4, 7]),
        ({"threshold": 0.95, "fewest": 9, "most": 9}, [1, 5], 0.1, [2, 3, 4, 6, 7]),
        ({}, [1, 2, 3, 4, 5, 6, 7], 0.0, []),  # the engine writes the best one
    ],
)
def test_ends_of_text_are_held_back(params, eos, progress, positions):
    view = make_view([C8], **ends_at(*eos, progress=progress))
    assert chosen(cad(**params, release_end=0.3), view) == [positions]


def test_ends_of_text_are_held_back_from_the_least_entropy_too():
    entropy = torch.tensor([H8])
    view = make_view([C8], entropy=entropy, **ends_at(1, progress=0.2))
    strategy = cad(mode="entropy", entropy_threshold=0.3, release_end=0.5)
    assert chosen(strategy, view) == [[5]]


def test_the_published_example_of_a_held_back_end():
    view = make_view(
        [[0.99, 0.70, 0.96]],
        torch.ones(1, 3, dtype=torch.bool),
        is_eos=torch.tensor([[True, False, False]]),
    )
    assert chosen(cad(threshold=0.95, release_end=0.3), view) == [[2]]


@pytest.mark.parametrize("mode", MODES)
@given(
    seed=st.integers(0, 2**20),
    ties=st.booleans(),
    release=st.floats(0.0, 1.0, width=32),
)
def test_what_is_held_back_is_as_if_decided(mode, seed, ties, release):
    view = random_view(seed, ties=ties)
    masked = view.masked.clone()
    for row, progress in enumerate(view.progress.tolist()):
        for i in range(masked.shape[1]):
            if view.is_eos[row, i] and progress < release:
                masked[row, i] = False
    strategy = cad(mode=mode, entropy_threshold=0.8, release_end=release)
    rule = rules.cad(0.8, 1, 4, mode)
    assert chosen(strategy, view) == expected(rule, replace(view, masked=masked))


def test_each_row_has_its_own_limits():
    params = {
        "release_end": torch.zeros(3),
        "threshold": torch.tensor([0.75, 0.75, 0.95]),
        "entropy_threshold": torch.full((3,), 0.3),
        "fewest": torch.tensor([1, 1, 3]),
        "most": torch.tensor([4, 2, 9]),
    }
    commit = cad().select(make_view([C8] * 3), params).commit
    assert [row.nonzero()[:, 0].tolist() for row in commit] == [
        [1, 2, 4, 5],
        [1, 5],
        [1, 2, 5],
    ]


@pytest.mark.parametrize("mode", MODES)
@given(
    seed=st.integers(0, 2**20),
    ties=st.booleans(),
    # Among them a confidence and an entropy that ties have.
    tau=st.floats(0.01, 2.0) | st.sampled_from([0.75**0.2, 0.75]),
    limits=st.tuples(st.integers(1, 10), st.integers(1, 10)).map(sorted),
)
def test_agrees_with_the_row_wise_reference(mode, seed, ties, tau, limits):
    fewest, most = limits
    view = random_view(seed, ties=ties)
    name = "threshold" if mode == "confidence" else "entropy_threshold"
    strategy = cad(**{name: tau}, fewest=fewest, most=most, mode=mode)
    assert chosen(strategy, view) == expected(rules.cad(tau, fewest, most, mode), view)


@pytest.mark.parametrize("mode", MODES)
@given(seed=st.integers(0, 2**20))
def test_other_rows_do_not_matter(mode, seed):
    strategy = cad(
        threshold=0.9, fewest=2, mode=mode, entropy_threshold=1.0, release_end=0.5
    )
    assert_rows_independent(strategy, random_view(seed), seed)


@given(seed=st.integers(0, 2**20), ties=st.booleans(), tau=st.floats(0.01, 2.0))
def test_without_limits_it_is_a_threshold(seed, ties, tau):
    view = random_view(seed, ties=ties)
    by_confidence = Threshold(ThresholdParams(threshold=tau), 8, CPU)
    assert chosen(cad(threshold=tau, most=8), view) == chosen(by_confidence, view)
    by_entropy = Entropy(EntropyParams(threshold=tau), 8, CPU)
    strategy = cad(entropy_threshold=tau, most=8, mode="entropy")
    assert chosen(strategy, view) == chosen(by_entropy, view)


@given(
    seed=st.integers(0, 2**20),
    ties=st.booleans(),
    tau=st.floats(0.01, 2.0),
    count=st.integers(1, 9),
)
def test_between_equal_limits_it_is_static(seed, ties, tau, count):
    view = random_view(seed, ties=ties)
    view.scheduled.fill_(count)
    static = Static(StaticParams(), 8, CPU)
    strategy = cad(threshold=tau, fewest=count, most=count)
    assert chosen(strategy, view) == chosen(static, view)


def test_a_row_without_masks_commits_nothing():
    view = make_view([C8], torch.zeros(1, 8, dtype=torch.bool))
    assert chosen(cad(fewest=2), view) == [[]]


def test_asks_only_for_what_its_mode_reads():
    assert cad().needs == set()
    assert cad(mode="entropy").needs == {"entropy"} == Cad.needs
    with pytest.raises(ValueError, match=r"needs View\.entropy"):
        chosen(cad(mode="entropy"), make_view([C8]))


def test_registered_with_bounds():
    assert STRATEGIES["cad"] is Cad
    assert CadParams().model_dump() == {
        "threshold": 0.95,
        "fewest": 1,
        "most": 32,
        "mode": "confidence",
        "entropy_threshold": 0.3,
        "release_end": 0.0,
    }
    assert numeric_fields(CadParams) == [
        "threshold",
        "fewest",
        "most",
        "entropy_threshold",
        "release_end",
    ]
    for bad in (
        {"threshold": 0.0},
        {"threshold": 2.5},
        {"fewest": 0},
        {"most": 10**7},
        {"mode": "random"},
        {"entropy_threshold": -0.1},
        {"release_end": -0.1},
        {"release_end": 1.1},
    ):
        with pytest.raises(ValidationError):
            CadParams(**bad)
    with pytest.raises(ValidationError, match="lower fewest or raise most"):
        CadParams(fewest=33)
