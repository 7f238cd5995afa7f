# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reference import stateful_rules
from reference.stateful_rules import remembering
from reference.views import (
    CPU,
    make_view,
    random_view,
    select,
    with_probabilities,
)
from reference.walks import (
    assert_agrees,
    assert_rows_alone,
    decisions_of,
    random_block,
)

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import numeric_fields
from vllm_dlm.strategies.klass import Klass, KlassParams, divergence
from vllm_dlm.strategies.static import Static, StaticParams

# The distributions of two positions in four steps: one comes to rest, one does not.
RESTING = [[0.80, 0.15, 0.05], [0.92, 0.05, 0.03], [0.93, 0.045, 0.025]]
RESTING += [[0.935, 0.04, 0.025]]
MOVING = [[0.95, 0.03, 0.02], [0.70, 0.20, 0.10], [0.96, 0.02, 0.02]]
MOVING += [[0.95, 0.03, 0.02]]

numbers = st.fixed_dictionaries(
    {
        "threshold": st.floats(0.01, 1.2),
        "kl_threshold": st.sampled_from([0.0, 1e-4, 1e-3, 0.01, 0.1, 1.0, 50.0]),
        "history": st.integers(1, 4),
    }
)


def klass(width: int = 6, **params: Any) -> Klass:
    return Klass(KlassParams(**params), width, CPU)


def rule(**params: Any):
    return remembering(lambda: stateful_rules.Klass(**params))


def test_worked_positions():
    both = torch.tensor([RESTING, MOVING]).transpose(0, 1)[:, None]
    decisions = decisions_of(klass(2), both)
    written = [one.commit[0].tolist() for one in decisions]
    # Before step 3 nothing has rested for two steps: the best one by schedule.
    assert written == [[False, True], [True, False], [False, True], [True, False]]
    stable = [one.state["stable_steps"][0].tolist() for one in decisions]
    assert stable == [[0, 0], [0, 0], [1, 0], [2, 1]]


def test_divergences_of_the_worked_positions():
    for values, expected in [
        (RESTING, [0.05833, 0.00075, 0.00030]),
        (MOVING, [0.3266, 0.22498, 0.00222]),
    ]:
        for step in (1, 2, 3):
            now = torch.tensor([[values[step]]])
            view = with_probabilities(make_view([[0.0]]), now)
            before = torch.tensor([[values[step - 1]]])
            moved = divergence(view.probabilities, before, torch.tensor([[[0, 1, 2]]]))
            assert moved.item() == pytest.approx(expected[step - 1], abs=5e-6)


def test_at_rest_it_writes_all_that_is_sure():
    still = torch.tensor([[[0.95, 0.03, 0.02], [0.94, 0.04, 0.02], [0.8, 0.1, 0.1]]])
    decisions = decisions_of(klass(3), still.expand(3, 1, 3, 3))
    written = [one.commit[0].tolist() for one in decisions]
    assert written == [[True, False, False]] * 2 + [[True, True, False]]


@pytest.mark.parametrize("history", [1, 2, 5])
def test_nothing_is_at_rest_before_as_many_steps(history):
    still = torch.tensor([0.95, 0.05]).expand(7, 1, 2, 2)
    decisions = decisions_of(klass(2, history=history), still)
    both = [bool(one.commit.all()) for one in decisions]
    assert both == [step >= history for step in range(7)]


@given(seed=st.integers(0, 2**20), vocab=st.sampled_from([64, 65, 200]))
def test_divergence_is_at_most_the_true_one(seed, vocab):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 1, 5, vocab, generator=generator)
    logits[1] = logits[0] + (seed % 4) * 0.3 * logits[1]
    before, now = logits.softmax(dim=-1)
    true = (now * (now.log() - before.log())).sum(dim=-1)
    view = with_probabilities(random_view(seed, 1, 5), now)
    kept, tokens = with_probabilities(view, before).probabilities.top(64)
    got = divergence(view.probabilities, kept, tokens)
    # Of float32: the true one is a sum of many.
    assert (got <= true * (1 + 1e-3) + 1e-4).all() and (got >= -1e-4).all()
    if vocab == 64:
        torch.testing.assert_close(got, true, atol=1e-4, rtol=1e-3)


def test_divergence_is_finite_where_probabilities_vanish():
    sure = torch.tensor([[[1.0, 0.0, 0.0]]])
    other = torch.tensor([[[0.0, 0.0, 1.0]]])
    ids = torch.tensor([[[0, 1, 2]]])
    view = make_view([[0.0]])
    for before, now in [(sure, other), (other, sure), (sure, sure)]:
        moved = divergence(with_probabilities(view, now).probabilities, before, ids)
        assert moved.isfinite().all()
        assert (moved > 20).item() == (before is not now)


def test_a_position_that_was_not_computed_is_not_at_rest():
    still = torch.tensor([0.95, 0.05]).expand(1, 2, 2)
    view = with_probabilities(make_view([[0.0, 0.0]]), still)
    unseen = replace(view.probabilities, rows=np.array([[0, -1]]))
    view = replace(view, masked=torch.ones(1, 2, dtype=torch.bool))
    strategy = klass(2, history=1)
    decision = select(strategy, replace(view, probabilities=unseen))
    decision = select(strategy, replace(view, state=decision.state))
    assert decision.state["stable_steps"].tolist() == [[1, 0]]


@given(
    seed=st.integers(0, 2**20),
    vocab=st.sampled_from([12, 80]),
    numbers=st.lists(numbers, min_size=4, max_size=4),
)
def test_agrees_with_the_row_wise_reference(seed, vocab, numbers):
    assert_agrees(klass(), rule, *random_block(seed, vocab=vocab), numbers)


@given(seed=st.integers(0, 2**20), numbers=st.lists(numbers, min_size=4, max_size=4))
def test_other_rows_do_not_matter(seed, numbers):
    assert_rows_alone(klass(), *random_block(seed), numbers)


@given(seed=st.integers(0, 2**20), count=st.integers(1, 6))
def test_if_nothing_is_sure_it_is_static(seed, count):
    view, probabilities = random_block(seed)
    view.scheduled.fill_(count)
    view = with_probabilities(view, probabilities[0])
    static = Static(StaticParams(), 6, CPU)
    for strategy in (klass(threshold=1.5), klass(kl_threshold=0.0)):
        state = None
        for _ in range(3):
            seen = view if state is None else replace(view, state=state)
            decision = select(strategy, seen)
            state = decision.state
            assert torch.equal(decision.commit, select(static, view).commit)


def test_registered_with_bounds():
    assert STRATEGIES["klass"] is Klass
    defaults = {"threshold": 0.9, "kl_threshold": 0.01, "history": 2}
    assert KlassParams().model_dump() == defaults
    assert numeric_fields(KlassParams) == list(defaults)
    assert Klass.needs == {"probabilities"}
    for bad in (
        {"threshold": 0.0},
        {"kl_threshold": -0.1},
        {"history": 0},
        {"history": 9},
    ):
        with pytest.raises(ValidationError):
            KlassParams(**bad)
