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
from vllm_dlm.strategies.base import Decision, numeric_fields
from vllm_dlm.strategies.slowfast import SlowFast, SlowFastParams
from vllm_dlm.strategies.threshold import Threshold, ThresholdParams

numbers = st.fixed_dictionaries(
    {
        "threshold": st.floats(0.01, 1.2),
        "horizon_threshold": st.floats(0.0, 1.2),
        "slow_steps": st.integers(1, 9),
    }
)


def slowfast(**params: Any) -> SlowFast:
    return SlowFast(SlowFastParams(**params), 8, CPU)


def rule(**params: Any):
    return remembering(lambda: stateful_rules.SlowFast(**params))


def steps(strategy: SlowFast, confidences: list[list[float]]) -> list[Decision]:
    """The decisions of successive steps; all is masked before the first."""
    masked = torch.ones(1, len(confidences[0]), dtype=torch.bool)
    state: dict[str, torch.Tensor] = {}
    found = []
    for confidence in confidences:
        view = make_view([confidence], masked.clone(), state=state)
        found.append(select(strategy, view))
        masked &= ~found[-1].commit
        state = dict(found[-1].state or {})
    return found


def positions(decisions: list[Decision]) -> list[list[int]]:
    return [one.commit[0].nonzero()[:, 0].tolist() for one in decisions]


def remembered(decisions: list[Decision], name: str) -> list[int]:
    return [int(one.state[name]) for one in decisions]


def test_worked_block():
    strategy = slowfast(horizon_threshold=0.3)
    block = [
        [0.99, 0.70, 0.40, 0.20, 0.35, 0.10, 0.05, 0.05],  # horizon 5
        [0.99, 0.95, 0.60, 0.50, 0.20, 0.10, 0.05, 0.05],  # 4: stable, [0, 4)
        [0.99, 0.95, 0.90, 0.88, 0.95, 0.95, 0.50, 0.50],  # fast: 4 and 5 must wait
        [0.99, 0.95, 0.90, 0.88, 0.80, 0.95, 0.50, 0.50],  # the next cycle, from 4
    ]
    decisions = steps(strategy, block)
    assert positions(decisions) == [[0], [1], [2, 3], [5]]
    assert remembered(decisions, "start") == [0, 0, 0, 4]
    assert remembered(decisions, "end") == [0, 4, 4, 0]
    assert remembered(decisions, "horizon")[:2] == [5, 4]
    assert remembered(decisions, "horizon")[3] == 8


def test_without_stability_the_span_ends_at_the_mean():
    strategy = slowfast(slow_steps=3)
    far, near = [0.5] * 8, [0.5, 0.4, 0.3] + [0.0] * 5
    decisions = steps(strategy, [far, near, far])
    assert remembered(decisions, "end") == [0, 0, (3 + 8) // 2]
    assert remembered(steps(slowfast(slow_steps=1), [near]), "end") == [3]


def test_where_nothing_is_foreseen_the_span_is_one_position():
    decisions = steps(slowfast(), [[0.01, 0.02, 0.03, 0.05]] * 3)
    assert remembered(decisions, "end") == [0, 1, 1]
    # The slow phase takes the best ones, wherever; the fast one takes the span's.
    assert positions(decisions) == [[3], [2], [0]]


def test_where_nothing_is_foreseen_the_span_may_be_full_at_once():
    # Step 1 wrote position 0, so that [0, 1) needs no fast phase.
    decisions = steps(slowfast(), [[0.01] * 7 + [0.05]] * 3)
    assert remembered(decisions, "start") == [0, 0, 1]


def test_the_slow_phase_writes_beyond_the_span():
    assert chosen(slowfast(threshold=0.7), make_view([C8])) == [[1, 2, 4, 5, 7]]
    assert chosen(slowfast(threshold=0.98), make_view([C8])) == [[1]]


@given(seed=st.integers(0, 2**20), numbers=st.lists(numbers, min_size=4, max_size=4))
def test_agrees_with_the_row_wise_reference(seed, numbers):
    assert_agrees(slowfast(), rule, *random_block(seed), numbers)


@given(seed=st.integers(0, 2**20), numbers=st.lists(numbers, min_size=4, max_size=4))
def test_other_rows_do_not_matter(seed, numbers):
    assert_rows_alone(slowfast(), *random_block(seed), numbers)
    assert_rows_independent(slowfast(), random_view(seed), seed)


@given(seed=st.integers(0, 2**20), ties=st.booleans(), tau=st.floats(0.01, 2.0))
def test_with_all_in_sight_it_is_a_threshold(seed, ties, tau):
    strategy = slowfast(threshold=tau, horizon_threshold=0.0, slow_steps=1)
    threshold = Threshold(ThresholdParams(threshold=tau), 8, CPU)
    view = random_view(seed, ties=ties)
    for _ in range(8):
        assert chosen(strategy, view) == chosen(threshold, view)
        decision = select(strategy, view)
        left = view.masked & ~decision.commit
        view = replace(view, masked=left, state=decision.state)


def test_a_row_without_masks_writes_nothing():
    view = make_view([C8], torch.zeros(1, 8, dtype=torch.bool))
    assert chosen(slowfast(), view) == [[]]


def test_registered_with_bounds():
    assert STRATEGIES["slowfast"] is SlowFast
    defaults = {"threshold": 0.85, "horizon_threshold": 0.1, "slow_steps": 8}
    assert SlowFastParams().model_dump() == defaults
    assert numeric_fields(SlowFastParams) == list(defaults)
    for bad in (
        {"threshold": 0.0},
        {"horizon_threshold": -0.1},
        {"horizon_threshold": 2.5},
        {"slow_steps": 0},
    ):
        with pytest.raises(ValidationError):
            SlowFastParams(**bad)
