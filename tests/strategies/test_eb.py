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
from vllm_dlm.strategies.eb import EntropyBounded, EntropyBoundedParams
from vllm_dlm.strategies.static import Static, StaticParams


def bounded(bound: float, width: int = 8) -> EntropyBounded:
    return EntropyBounded(EntropyBoundedParams(bound=bound), width, CPU)


def worked_view(rows: int = 1) -> View:
    return make_view([C8] * rows, entropy=torch.tensor([H8] * rows))


@pytest.mark.parametrize(
    ("bound", "positions"),
    [
        (0.001, [0]),
        (0.1, [0]),
        (0.2, [0, 1]),
        (0.6, [0, 1, 3]),
        (0.92, [0, 1, 3, 4]),
        (1.61, [0, 1, 2, 3, 4]),
    ],
)
def test_worked_distributions(bound, positions):
    assert chosen(bounded(bound, 5), distributions_view()) == [positions]


# What the tokens less uncertain than 1, 5, 4, 2, 3, ... sum to: 0, .14, .44, .97, 1.57.
@pytest.mark.parametrize(
    ("bound", "positions"),
    [(0.1, [1]), (0.2, [1, 5]), (0.5, [1, 4, 5]), (1.0, [1, 2, 4, 5])],
)
def test_worked_block(bound, positions):
    assert chosen(bounded(bound), worked_view()) == [positions]


def test_certain_tokens_cost_nothing():
    entropy = torch.tensor([[0.0, 0.0, 0.9, 0.5, 0.0, 0.9, 0.9, 0.9]])
    view = make_view([C8], entropy=entropy)
    assert chosen(bounded(0.0), view) == [[1, 3, 4]]


def test_each_row_has_its_own_bound():
    params = {"bound": torch.tensor([0.1, 0.5, 100.0])}
    commit = bounded(0.1).select(worked_view(rows=3), params).commit
    assert commit.sum(dim=1).tolist() == [1, 3, 7]


@given(
    seed=st.integers(0, 2**20),
    ties=st.booleans(),
    bound=st.floats(0.0, 12.0) | st.sampled_from([0.75, 1.5, 3.0]),  # sums of ties
)
def test_agrees_with_the_row_wise_reference(seed, ties, bound):
    view = random_view(seed, ties=ties)
    assert chosen(bounded(bound), view) == expected(rules.entropy_bounded(bound), view)


@given(seed=st.integers(0, 2**20))
def test_other_rows_do_not_matter(seed):
    assert_rows_independent(bounded(1.0), random_view(seed), seed)


@given(seed=st.integers(0, 2**20), ties=st.booleans())
def test_at_its_limits(seed, ties):
    view = random_view(seed, ties=ties)
    everything = [row.nonzero()[:, 0].tolist() for row in view.masked]
    assert chosen(bounded(1e6), view) == everything
    # Nothing is certain: one at a time, the least entropy first.
    view.entropy.clamp_(min=0.25)
    view.scheduled.fill_(1)
    static = Static(StaticParams(mode="entropy"), 8, CPU)
    assert chosen(bounded(0.0), view) == chosen(static, view)


def test_a_row_without_masks_commits_nothing():
    view = worked_view()
    view.masked.fill_(False)
    assert chosen(bounded(0.5), view) == [[]]


def test_registered_with_bounds():
    assert STRATEGIES["eb"] is EntropyBounded
    assert numeric_fields(EntropyBoundedParams) == ["bound"]
    assert EntropyBoundedParams().bound == 0.1
    for bad in (-0.1, 2e6, float("nan")):
        with pytest.raises(ValidationError):
            EntropyBoundedParams(bound=bad)
    assert bounded(0.1).needs == {"entropy"}
    with pytest.raises(ValueError, match=r"needs View\.entropy"):
        chosen(bounded(0.1), make_view([C8]))
