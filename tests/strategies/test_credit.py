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
from reference.views import CPU, make_view, select, with_probabilities
from reference.walks import (
    assert_agrees,
    assert_rows_alone,
    decisions_of,
    random_block,
    walk,
)

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import numeric_fields
from vllm_dlm.strategies.credit import Credit, CreditParams
from vllm_dlm.strategies.probabilities import fused
from vllm_dlm.strategies.threshold import Threshold, ThresholdParams

numbers = st.fixed_dictionaries(
    {
        "threshold": st.floats(0.01, 1.2),
        "weight": st.floats(0.0, 5.0),
        "exponent": st.floats(0.0, 3.0),
        "decay": st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    }
)


def credit(width: int = 6, **params: Any) -> Credit:
    return Credit(CreditParams(**params), width, CPU)


def rule(**params: Any):
    return remembering(lambda: stateful_rules.Credit(**params))


def test_worked_position():
    p = torch.tensor([0.80, 0.15, 0.05])
    view = with_probabilities(make_view([[0.0]]), p[None, None])
    decisions = decisions_of(credit(5), p.expand(5, 1, 5, 3))
    for decision, expected in zip(
        decisions, [0.8648, 0.8896, 0.9028, 0.9109, 0.9163], strict=True
    ):
        found = fused(
            view.probabilities,
            decision.state["tokens"][:, :1].long(),
            decision.state["credit"][:, :1],
            torch.tensor(0.7),
        )
        assert found.amax().item() == pytest.approx(expected, abs=5e-5)
    # Over .9 from the third step on; before, one token for progress.
    assert [int(one.commit.sum()) for one in decisions] == [1, 1, 5, 5, 5]


def test_a_token_with_credit_may_beat_the_candidate():
    block = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.48, 0.52]])
    last = decisions_of(credit(3), block[:, None, None].expand(3, 1, 3, 2))[-1]
    assert last.new_tokens.tolist() == [[0, 0, 0]]
    # .6^.2 (.8^2 + .8) for token 0, .52^.2 for token 1.
    assert last.state["tokens"][0, 0].tolist() == [0, 1, 0]
    assert last.state["credit"][0, 0].tolist() == pytest.approx(
        [1.300, 0.877, 0.0], abs=1e-3
    )


def test_without_parameters_credit_grows_with_the_block():
    view, _ = random_block(0)
    strategy = credit(4, mode="parameter_free", threshold=0.9)
    p = torch.tensor([0.8, 0.2]).expand(1, 4, 2)
    masked = torch.tensor([[False, False, True, True]])
    half = with_probabilities(make_view([[0.0] * 4], masked), p)
    decision = select(strategy, half)
    # C = .8, weight .5: .8 * 1.8^.5 / (.2 + .8 * 1.8^.5) = .843
    assert decision.commit.tolist() == [[False, False, True, False]]
    assert decision.state["credit"][0, 2].max().item() == pytest.approx(0.8)
    decision = select(strategy, replace(half, state=decision.state))
    assert decision.state["credit"][0, 2].max().item() == pytest.approx(0.4 + 0.8)
    fresh = with_probabilities(make_view([[0.0] * 4], masked | True), p)
    loose = credit(4, mode="parameter_free", threshold=0.8001)
    assert int(select(loose, fresh).commit.sum()) == 1  # weight 0: nothing is raised


def test_in_a_long_block_the_least_credit_makes_room():
    strategy = credit(80, exponent=0.0, decay=1.0)
    order = [0, *range(66)]  # token 0 is a candidate twice
    p = torch.full((len(order), 1, 80, 100), 0.001)
    for step, token in enumerate(order):
        p[step, :, :, token] = 1 - 0.099
    state = decisions_of(strategy, p)[-1].state
    assert state["tokens"].shape == (1, 80, 64)
    held = set(state["tokens"][0, 0].tolist())
    assert len(held) == 64 and {0, 65} <= held
    assert held < set(range(66))


@pytest.mark.parametrize("mode", ["fixed", "parameter_free"])
@given(seed=st.integers(0, 2**20), numbers=st.lists(numbers, min_size=4, max_size=4))
def test_agrees_with_the_row_wise_reference(mode, seed, numbers):
    def row_rule(**params: Any):
        return rule(**params, parameter_free=mode == "parameter_free")

    assert_agrees(credit(mode=mode), row_rule, *random_block(seed), numbers)


@given(seed=st.integers(0, 2**20), numbers=st.lists(numbers, min_size=4, max_size=4))
def test_other_rows_do_not_matter(seed, numbers):
    assert_rows_alone(credit(), *random_block(seed), numbers)


@given(seed=st.integers(0, 2**20), tau=st.floats(0.01, 2.0))
def test_without_weight_it_is_a_threshold(seed, tau):
    strategy = credit(threshold=tau, weight=0.0)
    threshold = Threshold(ThresholdParams(threshold=tau), 6, CPU)
    row = strategy.params.model_dump(exclude={"mode"})
    for view, decision in walk(strategy, *random_block(seed), [row] * 4):
        assert torch.equal(decision.commit, select(threshold, view).commit)
        chosen = decision.new_tokens[decision.commit]
        assert torch.equal(chosen, view.candidate[decision.commit])


def test_only_what_was_a_candidate_of_a_mask_has_credit():
    p = torch.tensor([0.5, 0.3, 0.2]).expand(1, 2, 3)
    view = with_probabilities(make_view([[0.0, 0.0]]), p)  # position 0 is decided
    view = replace(view, candidate=torch.tensor([[0, 2]]))  # drawn
    view = replace(view, confidence=torch.tensor([[0.5, 0.2]]))
    decision = select(credit(2), view)
    assert decision.new_tokens[0, 1] == 2
    assert decision.state["credit"][0, 0].tolist() == [0.0, 0.0]
    assert decision.state["tokens"][0, 1, 0] == 2


def test_extreme_parameters_stay_finite():
    sure = torch.tensor([1.0, 0.0]).expand(64, 1, 64, 2)
    strategy = credit(64, weight=5.0, exponent=0.0, decay=1.0, threshold=2.0)
    for decision in decisions_of(strategy, sure):
        assert int(decision.commit.sum()) == 1
        assert decision.state["credit"].isfinite().all()


def test_registered_with_bounds():
    assert STRATEGIES["credit"] is Credit
    defaults = {"threshold": 0.9, "weight": 0.7, "exponent": 0.2, "decay": 0.8}
    assert CreditParams().model_dump() == defaults | {"mode": "fixed"}
    assert numeric_fields(CreditParams) == list(defaults)
    assert Credit.needs == {"probabilities"}
    for bad in (
        {"threshold": 0.0},
        {"weight": -0.1},
        {"weight": 6.0},
        {"exponent": -1.0},
        {"decay": 1.1},
        {"mode": "free"},
    ):
        with pytest.raises(ValidationError):
            CreditParams(**bad)
