# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reference import stateful_rules
from reference.stateful_rules import remembering
from reference.views import (
    C8,
    CPU,
    assert_rows_independent,
    chosen,
    make_view,
    random_view,
    select,
)
from reference.walks import assert_agrees, assert_rows_alone, random_block

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.bacd import Bacd, BacdParams
from vllm_dlm.strategies.base import numeric_fields
from vllm_dlm.strategies.threshold import Threshold, ThresholdParams

bounds = st.tuples(st.floats(0.01, 1.2), st.floats(0.01, 1.2)).map(sorted)


def bacd(**params: Any) -> Bacd:
    return Bacd(BacdParams(**params), 8, CPU)


def rule(lowest: float, highest: float):
    return remembering(lambda: stateful_rules.Bacd(lowest, highest))


def steps(strategy: Bacd, confidences: list[list[float]]) -> list[list[int]]:
    """Positions written in each step; all are masked before the first."""
    masked = torch.ones(1, len(confidences[0]), dtype=torch.bool)
    state, found = {}, []
    for confidence in confidences:
        view = make_view([confidence], masked.clone(), state=state)
        decision = select(strategy, view)
        found.append(decision.commit[0].nonzero()[:, 0].tolist())
        masked &= ~decision.commit
        state = decision.state
    return found


def test_the_papers_figure():
    block = [
        [0.8, 0.6, 0.7, 0.3],
        [0.8, 0.65, 0.70, 0.5],  # the mean is .8: only the best one
        [0.8, 0.74, 0.7, 0.75],  # .75
        [0.8, 0.8, 0.7, 0.75],
    ]
    assert steps(bacd(), block) == [[0], [2], [3], [1]]


def test_worked_block():
    masked = C8[1:]
    block = [
        masked,  # .97, clamped to .9
        [0.97, 0.88, 0.61, 0.91, 0.93, 0.45, 0.90],  # .95, clamped
        [0.97, 0.92, 0.70, 0.91, 0.93, 0.50, 0.90],
        [0.97, 0.92, 0.70, 0.91, 0.93, 0.50, 0.90],  # none is sure: the best one
    ]
    assert steps(bacd(), block) == [[0, 4], [3, 6], [1], [2]]
    assert chosen(bacd(), make_view([C8])) == [[1, 5]]


def test_the_mean_is_over_all_that_the_block_wrote():
    block = [
        [0.7, 0.6, 0.5, 0.5],  # tau .7
        [0.7, 0.69, 0.5, 0.5],  # .7: the best one, .69
        [0.7, 0.69, 0.694, 0.693],  # (.7 + .69) / 2 = .695: the best one
        [0.7, 0.69, 0.694, 0.694],
    ]
    assert steps(bacd(), block) == [[0], [1], [2], [3]]
    block[2] = [0.7, 0.69, 0.695, 0.696]
    assert steps(bacd(), block[:3]) == [[0], [1], [2, 3]]


def test_the_same_confidence_again_is_sure_enough():
    # The mean of three equal numbers must not be above them.
    block = [[0.7, 0.7, 0.7, 0.1, 0.1], [0.7, 0.7, 0.7, 0.7, 0.7]]
    assert steps(bacd(), block) == [[0, 1, 2], [3, 4]]


@given(seed=st.integers(0, 2**20), limits=st.lists(bounds, min_size=4, max_size=4))
def test_agrees_with_the_row_wise_reference(seed, limits):
    numbers = [{"lowest": low, "highest": high} for low, high in limits]
    assert_agrees(bacd(), rule, *random_block(seed), numbers)


@given(seed=st.integers(0, 2**20), limits=st.lists(bounds, min_size=4, max_size=4))
def test_other_rows_do_not_matter(seed, limits):
    numbers = [{"lowest": low, "highest": high} for low, high in limits]
    assert_rows_alone(bacd(), *random_block(seed), numbers)
    assert_rows_independent(bacd(), random_view(seed), seed)


@given(seed=st.integers(0, 2**20), ties=st.booleans(), tau=st.floats(0.01, 2.0))
def test_between_equal_bounds_it_is_a_threshold(seed, ties, tau):
    strategy = bacd(lowest=tau, highest=tau)
    threshold = Threshold(ThresholdParams(threshold=tau), 8, CPU)
    view = random_view(seed, ties=ties)
    decision = select(strategy, view)
    assert torch.equal(decision.commit, select(threshold, view).commit)
    later = random_view(seed + 1, ties=ties)
    later = replace(later, state=decision.state)
    assert chosen(strategy, later) == chosen(threshold, later)


def test_a_row_without_masks_writes_and_remembers_nothing():
    view = make_view([C8], torch.zeros(1, 8, dtype=torch.bool))
    decision = select(bacd(), view)
    assert not decision.commit.any()
    assert float(decision.state["count"]) == float(decision.state["sum"]) == 0


def test_registered_with_bounds():
    assert STRATEGIES["bacd"] is Bacd
    assert BacdParams().model_dump() == {"lowest": 0.6, "highest": 0.9}
    assert numeric_fields(BacdParams) == ["lowest", "highest"]
    for bad in ({"lowest": 0.0}, {"highest": 2.5}, {"lower": 0.5}):
        with pytest.raises(ValidationError):
            BacdParams(**bad)
    with pytest.raises(ValidationError, match="lower lowest or raise highest"):
        BacdParams(lowest=0.95)
