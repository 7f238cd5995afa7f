# SPDX-License-Identifier: Apache-2.0
"""DEL's rules: tokens per layer, the choice, the statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_dlm.spec_decode.del_exit.exits import (
    Choice,
    ExitStatistics,
    choose,
    goes_on,
    resolve_exits,
    tokens_per_layer,
    top_token,
)

# The specification's worked example: 32 layers, drafts of up to 18 tokens.
LAYERS, MOST = 32, 18
WORKED = {4: (0.5, 2, 0.04375), 8: (0.8, 3, 0.05271), 16: (0.9, 3, 0.04299)}


@pytest.mark.parametrize("exit", WORKED)
def test_worked_example_of_one_exit(exit: int):
    acceptance, length, value = WORKED[exit]
    assert choose(np.array([exit]), np.array([acceptance]), LAYERS, MOST) == (
        exit,
        length,
    )
    assert tokens_per_layer(exit, length, acceptance, LAYERS) == pytest.approx(
        value, abs=5e-6
    )


def test_worked_example_of_all_exits():
    acceptance = np.array([WORKED[exit][0] for exit in WORKED])
    assert choose(np.array(list(WORKED)), acceptance, LAYERS, MOST) == (8, 3)


def test_a_certain_exit_drafts_as_far_as_it_may():
    assert tokens_per_layer(4, 5, 1.0, 32) == 6 / 52
    assert choose(np.array([4]), np.array([1.0]), 32, 7) == (4, 7)


@pytest.mark.parametrize("acceptance", [math.nan, 0.0, 0.5])
def test_no_draft_where_none_pays(acceptance: float):
    """A draft of one pays where its acceptance exceeds its share of the layers."""
    assert choose(np.array([4]), np.array([acceptance]), 8, 9)[1] == 0
    assert choose(np.array([4]), np.array([0.51]), 8, 9)[1] == 1
    assert choose(np.array([4]), np.array([0.51]), 8, 0)[1] == 0


@given(
    st.lists(st.floats(0, 0.99), min_size=1, max_size=6),
    st.integers(7, 80),
    st.integers(0, 20),
)
def test_the_choice_is_the_best_of_all(
    acceptance: list[float], num_layers: int, most: int
):
    exits = range(1, len(acceptance) + 1)

    def by_formula(exit: int, length: int) -> float:
        a = acceptance[exit - 1]
        return (1 - a ** (length + 1)) / (1 - a) / (length * exit + num_layers)

    best = max(by_formula(exit, n) for exit in exits for n in range(most + 1))
    exit, length = choose(np.array(exits), np.array(acceptance), num_layers, most)
    assert by_formula(exit, length) == pytest.approx(best, rel=1e-9)
    assert tokens_per_layer(
        exit, length, acceptance[exit - 1], num_layers
    ) == pytest.approx(best, rel=1e-9)


def test_counts_decay_by_round():
    statistics = ExitStatistics([1, 2], decay=0.5)
    assert np.isnan(statistics.acceptance).all()
    statistics.update(
        np.array([[True, True], [False, True]]), np.array([[0.9, 0.8], [0.3, 0.6]])
    )
    assert statistics.acceptance.tolist() == [0.5, 1.0]
    # Halfway between .9 and .3; the second exit has not missed yet.
    assert statistics.thresholds[0] == pytest.approx(0.6)
    assert math.isnan(statistics.thresholds[1])
    statistics.update(np.array([[True, False]]), np.array([[0.5, 0.2]]))
    # Hits .5 + 1 and misses .5; hits 1 and misses 1.
    assert statistics.acceptance.tolist() == [0.75, 0.5]
    hit = (0.5 * 0.9 + 0.5) / 1.5
    assert statistics.thresholds.tolist() == pytest.approx([(hit + 0.3) / 2, 0.45])


def test_the_choice_follows_what_is_observed():
    """Without any draft: misses end drafting, hits bring it back."""
    statistics = ExitStatistics([2, 4], decay=0.9)
    lengths = []
    for hit in [False] * 10 + [True] * 30:
        statistics.update(np.array([[False, hit]]), np.array([[0.1, 0.5]]))
        choice = statistics.choose(num_layers=8, most=6)
        lengths.append(choice.length)
        assert choice.length == 0 or choice.exit == 4
    assert set(lengths[:10]) == {0}
    assert lengths[-1] > 1 and lengths == sorted(lengths)
    assert choice.threshold == statistics.thresholds[1]


def drafted_by(stop: str, choice: Choice, confidences: list[float]) -> int:
    """Tokens of a draft of which the exit is so sure, one after the other."""
    product = 1.0
    for drafted, confidence in enumerate(confidences, 1):
        product *= confidence
        if not goes_on(stop, choice, drafted, confidence, product):
            return drafted
    raise AssertionError("the draft has not ended")


@pytest.mark.parametrize(
    ("stop", "drafted"), [("both", 2), ("confidence", 3), ("length", 2), ("gain", 3)]
)
def test_worked_example_of_a_stop(stop: str, drafted: int):
    # With an exit after layer 2 of 8 that is right at .9: 2.71 tokens for 4 + 8 layers,
    # .4517 for two layers. .9 * .9 and .72 * .9 are more, .216 * .9 is less.
    least = 2 * tokens_per_layer(2, 2, 0.9, 8) / 0.9
    assert least * 0.9 == pytest.approx(0.45167, abs=1e-5)
    choice = Choice(2, 2, most=6, threshold=0.5, least_product=least)
    # The token that ends a draft is submitted.
    assert drafted_by(stop, choice, [0.9, 0.8, 0.3, 0.9, 0.9, 0.9]) == drafted


@pytest.mark.parametrize("stop", ["both", "confidence", "length", "gain"])
def test_no_stop_goes_beyond_what_the_request_may_take(stop: str):
    choice = Choice(2, 9, most=4, threshold=math.nan, least_product=0.1)
    assert drafted_by(stop, choice, [1.0] * 9) == 4


def test_the_least_product_of_a_choice():
    statistics = ExitStatistics([2])
    assert statistics.choose(num_layers=8, most=6).least_product == math.inf
    statistics.update(np.array([[True]] * 9 + [[False]]), np.full((10, 1), 0.8))
    choice = statistics.choose(num_layers=8, most=6)
    rate = (1 - 0.9 ** (choice.length + 1)) / 0.1 / (2 * choice.length + 8)
    assert choice.least_product * 0.9 == pytest.approx(rate * 2)
    assert choice.most == 6


@given(st.integers(1, 31))
def test_a_prompt_counts_the_same_in_chunks(cut: int):
    generator = np.random.default_rng(cut)
    hits, sure = generator.random((32, 3)) < 0.5, generator.random((32, 3))
    whole, parts = ExitStatistics([1, 2, 3]), ExitStatistics([1, 2, 3])
    whole.update(hits, sure, new_round=False)
    for part in (slice(0, cut), slice(cut, 32)):
        parts.update(hits[part], sure[part], new_round=False)
    assert np.allclose(whole.counts, parts.counts)
    assert np.allclose(whole.thresholds, parts.thresholds, equal_nan=True)


@pytest.mark.parametrize(
    ("num_layers", "exits"),
    [
        (2, [1]),
        (5, [1, 2, 3, 4]),
        (9, [1, 2, 3, 4, 5, 6, 7, 8]),
        (32, [4, 7, 11, 14, 18, 21, 25, 28]),
    ],
)
def test_default_exits_are_spread_evenly(num_layers: int, exits: list[int]):
    assert resolve_exits(None, num_layers) == exits


def test_exits_of_the_user():
    assert resolve_exits([5, 2, 2], 8) == [2, 5]
    with pytest.raises(ValueError, match="exits are 1 to 7"):
        resolve_exits([2, 8], 8)
    with pytest.raises(ValueError, match="only 1"):
        resolve_exits(None, 1)


@pytest.mark.parametrize("exits", [[], [0, 1], [2, 1], [1, 1]])
def test_statistics_refuse_other_exits(exits: list[int]):
    with pytest.raises(ValueError, match="ascending layers from 1"):
        ExitStatistics(exits)


@pytest.mark.parametrize("decay", [0.0, 1.5, math.nan])
def test_statistics_refuse_other_decays(decay: float):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        ExitStatistics([1], decay)


def test_top_token():
    torch.manual_seed(0)
    logits = 30 * torch.randn(20, 50, dtype=torch.bfloat16)
    tokens, sure = top_token(logits)
    probability = logits.float().softmax(-1)
    assert tokens.tolist() == probability.argmax(-1).tolist()
    torch.testing.assert_close(sure, probability.amax(-1))
