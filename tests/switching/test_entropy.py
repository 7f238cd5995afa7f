# SPDX-License-Identifier: Apache-2.0
"""The rule by itself."""

from __future__ import annotations

import math
from statistics import mean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_dlm.switching.entropy import (
    LARGE,
    SMALL,
    SwitchRule,
    Turn,
    entropy_bits,
    make_rule,
    rule_of_request,
)


def first_end(turn: Turn, entropies: list[float]) -> int | None:
    """Index of the first token that the other model would write."""
    for written, entropy in enumerate(entropies):
        if turn.ends(written, entropy):
            return written
    return None


def test_the_worked_example():
    # Ten tokens of 1 bit, then 5 bits each: means 1.8, then 2.6.
    turn = Turn(SwitchRule(tau=2.5), SMALL)
    assert first_end(turn, [1.0] * 10 + [5.0] * 10) == 11


def test_the_large_model_hands_back_when_it_is_sure():
    rule = SwitchRule(tau=2.5)
    entropies = [5.0] * 10 + [1.0] * 10
    # Means: 4.2, 3.4, 2.6, 1.8.
    assert first_end(Turn(rule, LARGE), entropies) == 13
    assert first_end(Turn(rule, SMALL), entropies) == 10


@pytest.mark.parametrize(("model", "tau"), [(SMALL, 1.5), (LARGE, 1.5)])
def test_a_mean_equal_to_tau_switches(model, tau):
    assert first_end(Turn(SwitchRule(tau=tau), model), [1.5] * 20) == 10


def test_never_and_always():
    entropies = [3.0] * 40
    assert first_end(Turn(SwitchRule(tau=math.inf), SMALL), entropies) is None
    assert first_end(Turn(SwitchRule(tau=0), SMALL), entropies) == 10
    assert first_end(Turn(SwitchRule(tau=0), LARGE), entropies) is None


@given(
    entropies=st.lists(st.floats(0, 8), min_size=1, max_size=60),
    tau=st.floats(0, 8),
    window=st.integers(1, 8),
    extra=st.integers(0, 8),
    model=st.sampled_from([SMALL, LARGE]),
)
def test_the_rule_is_the_mean_of_the_last_entropies(
    entropies, tau, window, extra, model
):
    rule = SwitchRule(tau=tau, window=window, min_tokens=window + extra)
    turn = Turn(rule, model)
    for written, entropy in enumerate(entropies):
        expected = False
        if written >= rule.min_tokens:
            average = mean(entropies[written + 1 - window : written + 1])
            if math.isclose(average, tau, rel_tol=1e-9):
                return
            expected = average > tau if model == SMALL else average < tau
        assert turn.ends(written, entropy) == expected


def test_a_position_may_be_computed_twice():
    once, twice = (Turn(SwitchRule(tau=2.5), SMALL) for _ in range(2))
    for written, entropy in enumerate([1.0] * 10 + [5.0] * 3):
        twice.ends(written, 99.0)
        assert twice.ends(written, entropy) == once.ends(written, entropy)


def test_nats():
    # 1.8 nats are 2.6 bits.
    assert SwitchRule(tau=1.8, unit="nats").tau_bits == pytest.approx(2.59685)
    assert SwitchRule(tau=1.8).tau_bits == 1.8


def test_entropy_of_rows():
    logits = torch.tensor(
        [[0.0, 0, 0, 0], [9, 9, -torch.inf, -torch.inf], [-torch.inf] * 3 + [2]]
    )
    assert entropy_bits(logits).tolist() == pytest.approx([2, 1, 0])
    # Bfloat16 logits are not summed in bfloat16.
    wide = torch.zeros(1, 50_000, dtype=torch.bfloat16)
    assert entropy_bits(wide).item() == pytest.approx(math.log2(50_000), abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": -1}, "tau: .*greater than or equal to 0"),
        ({"tau": math.nan}, "tau: "),
        ({"tau": 1, "window": 0}, "window: .*greater than or equal to 1"),
        ({"tau": 1, "window": 11}, r"min_tokens \(10\) must be at least window \(11\)"),
        ({"tau": 1, "unit": "hartley"}, "'bits' or 'nats'"),
        ({"tau": 1, "windows": 3}, "Did you mean 'window'"),
        ({"tau": True}, "tau: .*a number, not a boolean"),
        ({"tau": 1, "window": True}, "window: .*a number, not a boolean"),
        ({"tau": 1, "min_tokens": False}, "min_tokens: .*a number, not a boolean"),
    ],
)
def test_options_that_are_not_valid(options, message):
    with pytest.raises(ValueError, match=message):
        make_rule(**options)


def test_a_request_may_change_the_rule():
    rule = SwitchRule(tau=2, window=3)
    assert rule_of_request(rule, {"other": 1}) is rule
    changed = rule_of_request(rule, {"ead_tau": 1.5, "ead_min_tokens": 4})
    assert changed == SwitchRule(tau=1.5, window=3, min_tokens=4)
    # JSON has no infinity.
    assert rule_of_request(rule, {"ead_tau": "inf"}).tau == math.inf
    with pytest.raises(ValueError, match="Did you mean 'ead_tau'"):
        rule_of_request(rule, {"ead_ta": 1})
    with pytest.raises(ValueError, match="window: .*a number, not a boolean"):
        rule_of_request(rule, {"ead_window": True})
    with pytest.raises(ValueError, match="tau: .*-3"):
        rule_of_request(rule, {"ead_tau": -3})
