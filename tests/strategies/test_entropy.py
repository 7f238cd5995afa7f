# SPDX-License-Identifier: Apache-2.0
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
    distributions_view,
    expected,
    make_view,
    random_view,
)

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import View, numeric_fields
from vllm_dlm.strategies.entropy import Entropy, EntropyParams
from vllm_dlm.strategies.static import Static, StaticParams


def entropy(threshold: float, width: int = 8) -> Entropy:
    return Entropy(EntropyParams(threshold=threshold), width, CPU)


def worked_view(rows: int = 1) -> View:
    return make_view([C8] * rows, entropy=torch.tensor([H8] * rows))


@pytest.mark.parametrize(
    ("threshold", "positions"), [(0.45, [0, 1, 3]), (0.30, [0]), (0.0, [0])]
)
def test_worked_distributions(threshold, positions):
    assert chosen(entropy(threshold, 5), distributions_view()) == [positions]


@pytest.mark.parametrize(
    ("threshold", "positions"),
    [
        (0.5, [1, 5]),
        (0.3, [1, 5]),  # equal is enough
        (0.55, [1, 4, 5]),
        (0.1, [1]),  # none is: the least uncertain one
    ],
)
def test_worked_block(threshold, positions):
    assert chosen(entropy(threshold), worked_view()) == [positions]


def test_each_row_has_its_own_threshold():
    params = {"threshold": torch.tensor([0.5, 0.1, 0.55])}
    commit = entropy(0.5).select(worked_view(rows=3), params).commit
    assert commit.sum(dim=1).tolist() == [2, 1, 3]


@given(
    seed=st.integers(0, 2**20),
    ties=st.booleans(),
    threshold=st.floats(0.0, 4.0) | st.sampled_from([0.75, 1.5]),  # those of ties
)
def test_agrees_with_the_row_wise_reference(seed, ties, threshold):
    view = random_view(seed, ties=ties)
    wanted = expected(rules.entropy(threshold), view)
    assert chosen(entropy(threshold), view) == wanted


@given(seed=st.integers(0, 2**20))
def test_other_rows_do_not_matter(seed):
    assert_rows_independent(entropy(1.0), random_view(seed), seed)


@given(seed=st.integers(0, 2**20), ties=st.booleans())
def test_at_its_limits(seed, ties):
    view = random_view(seed, ties=ties)
    everything = [row.nonzero()[:, 0].tolist() for row in view.masked]
    assert chosen(entropy(100.0), view) == everything
    # Nothing is certain: one at a time, the least entropy first.
    view.entropy.clamp_(min=0.25)
    view.scheduled.fill_(1)
    static = Static(StaticParams(mode="entropy"), 8, CPU)
    assert chosen(entropy(0.0), view) == chosen(static, view)


def test_a_row_without_masks_commits_nothing():
    view = worked_view()
    view.masked.fill_(False)
    assert chosen(entropy(0.5), view) == [[]]


def test_registered_with_bounds():
    assert STRATEGIES["entropy"] is Entropy
    assert numeric_fields(EntropyParams) == ["threshold"]
    assert EntropyParams().threshold == 0.5
    for bad in (-0.1, 100.5, float("nan")):
        with pytest.raises(ValidationError):
            EntropyParams(threshold=bad)
    assert entropy(0.5).needs == {"entropy"}
    with pytest.raises(ValueError, match=r"needs View\.entropy"):
        chosen(entropy(0.5), make_view([C8]))
