# SPDX-License-Identifier: Apache-2.0
"""The reference rules on worked examples, and whole requests against identities."""

from __future__ import annotations

import pytest
import torch
from reference.llada import TinyLLaDA, write_random_checkpoint
from reference.procedures import (
    CACHES,
    STATIC_MODES,
    Rule,
    View,
    factor,
    generate,
    learn2pd,
    row_statistics,
    static,
    static_schedule,
    threshold,
)

PROMPT = [5, 17, 93, 2, 41, 60, 11]
C8 = [0.99, 0.97, 0.80, 0.55, 0.78, 0.93, 0.40, 0.76]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyLLaDA:
    folder = tmp_path_factory.mktemp("llada")
    return TinyLLaDA.from_folder(write_random_checkpoint(folder, seed=0))


def make_view(
    confidence: list[float], revealed: tuple[int, ...] = (0,), scheduled: int = 1
) -> View:
    c = torch.tensor(confidence)
    masked = torch.ones(len(c), dtype=torch.bool)
    masked[list(revealed)] = False
    index = torch.arange(len(c))
    return View(masked, index, c, c, 1 - c, first=0, forward=0, scheduled=scheduled)


def hand_filter(tau: float, width: int = 8) -> Rule:
    """z_i = 40 c_i - 35."""
    eye = torch.eye(width)
    zero, bias = torch.zeros(width), torch.full((width,), -35.0)
    return learn2pd(eye, zero, 40 * eye, bias, tau=tau, k=1)


# --- The rules -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "scheduled", "expected"),
    [
        (static(), 2, [1, 5]),
        (static("entropy"), 2, [1, 5]),
        (static("margin"), 3, [1, 2, 5]),
        (static("left_to_right"), 2, [1, 2]),
        (static("random", lambda forward, p: -((p - 4) ** 2)), 3, [3, 4, 5]),
        (threshold(0.9), 1, [1, 5]),
        (threshold(0.98), 1, [1]),
        (threshold(0.93), 1, [1, 5]),
        (factor(0.5), 1, [1, 5]),
        (factor(1.0), 1, [1, 2, 5]),
        (factor(1.2), 1, [1, 2, 4, 5]),
        (hand_filter(0.96), 1, [1]),
        (hand_filter(0.9), 1, [1, 5]),
    ],
)
def test_rules_on_c8(rule, scheduled, expected):
    assert sorted(rule.select(make_view(C8, scheduled=scheduled))) == expected


def test_factor_boundaries():
    # Only the last candidate fails: it is not committed (the published loop does).
    assert factor(1.0).select(make_view([0.9, 0.9, 0.1], ())) == [0, 1]
    # All pass: all are committed (a known re-implementation drops the last).
    assert factor(1.0).select(make_view([0.9, 0.9, 0.9], ())) == [0, 1, 2]
    # The first one passes whatever its confidence.
    assert factor(1.0).select(make_view([0.1, 0.2, 0.1], ())) == [1]
    # The inequality is strict: 3 * (1 - 0.5) = 1.5.
    assert factor(1.5).select(make_view([0.5, 0.5], ())) == [0]


def test_ties_go_to_the_lowest_position_and_token():
    assert static().select(make_view([0.5] * 4, (), scheduled=2)) == [0, 1]
    assert threshold(0.9).select(make_view([0.5] * 4, (0,))) == [1]
    stats = row_statistics(torch.zeros(1, 8), banned_id=0)
    assert int(stats.argmax) == 1
    torch.testing.assert_close(stats.confidence, torch.tensor([1 / 7]))
    torch.testing.assert_close(stats.entropy, torch.tensor([7.0]).log())
    assert float(stats.margin) == 0


def test_learn2pd_filter_sees_ones_for_positions_cut_away():
    # Position 0 is accepted if and only if the padded position 7 counts as 1.0.
    w1 = torch.zeros(8, 8)
    w1[0, 7] = 1.0
    w2, b2 = 40 * torch.eye(8), torch.full((8,), -35.0)
    rule = learn2pd(w1, torch.zeros(8), w2, b2)
    assert rule.select(make_view([0.1, 0.9, 0.2], ())) == [0, 1]
    assert rule.select(make_view([0.1, 0.9] + [0.2] * 6, ())) == [1]


def test_static_schedule():
    assert static_schedule(32, 12) == [3] * 8 + [2] * 4
    assert static_schedule(7, 3) == [3, 2, 2]
    assert static_schedule(3, 5) == [1, 1, 1, 0, 0]


# --- Whole requests ------------------------------------------------------------

FULL = {"gen_length": 32, "block_length": 8, "eos_stop": False}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("mode", STATIC_MODES)
def test_static_takes_its_steps(model, mode, cache):
    table = torch.rand(32, 32, generator=torch.Generator().manual_seed(0))
    rule = static(mode, table if mode == "random" else None)
    result = generate(model, PROMPT, **FULL, rule=rule, cache=cache)
    assert result.forwards == 32
    assert sorted(result.step_of_position) == list(range(32))
    for block in range(4):
        in_block = result.step_of_position[8 * block : 8 * block + 8]
        assert sorted(in_block) == list(range(8 * block, 8 * block + 8))
        if mode == "left_to_right":
            assert in_block == sorted(in_block)
    assert model.mask_id not in result.tokens
    fewer = generate(model, PROMPT, **FULL, rule=rule, cache=cache, steps=12)
    assert fewer.forwards == 12
    assert [fewer.step_of_position.count(i) for i in range(12)] == [3, 3, 2] * 4


def test_one_block_one_step_commits_the_argmax_of_one_forward(model):
    result = generate(
        model,
        PROMPT,
        gen_length=16,
        block_length=16,
        rule=static(),
        steps=1,
        eos_stop=False,
    )
    logits = model.forward(PROMPT + [model.mask_id] * 16)[len(PROMPT) :]
    logits[:, model.mask_id] = -torch.inf
    assert result.tokens == logits.argmax(-1).tolist()
    assert result.forwards == 1 and result.step_of_position == [0] * 16


def test_random_scores_as_table_and_as_function_agree(model):
    table = torch.rand(32, 32, generator=torch.Generator().manual_seed(3))
    by_table = generate(model, PROMPT, **FULL, rule=static("random", table))
    function = static("random", lambda forward, p: float(table[forward, p]))
    assert generate(model, PROMPT, **FULL, rule=function) == by_table


@pytest.mark.parametrize("cache", CACHES)
def test_rules_that_accept_nothing_are_static_with_one_token(model, cache):
    one = generate(model, PROMPT, **FULL, rule=static(), cache=cache)
    zero = torch.zeros(8, 8), torch.zeros(8), torch.zeros(8, 8), torch.zeros(8)
    for rule in (threshold(1.01), factor(0.0), learn2pd(*zero)):
        assert generate(model, PROMPT, **FULL, rule=rule, cache=cache) == one


def test_caches_are_exact_with_one_layer(tmp_path):
    # Keys of a single layer depend on their own token alone, so none is ever stale.
    folder = write_random_checkpoint(tmp_path, seed=4, n_layers=1)
    model = TinyLLaDA.from_folder(folder)
    for rule in (static(), threshold(0.6), factor(1.0)):
        results = [
            generate(model, PROMPT, **FULL, rule=rule, cache=cache) for cache in CACHES
        ]
        assert results[0] == results[1] == results[2]


def test_caches_with_one_block(model):
    options = {"gen_length": 16, "block_length": 16, "eos_stop": False}
    none, prefix, dual = (
        generate(model, PROMPT, **options, rule=static(), cache=cache)
        for cache in CACHES
    )
    assert prefix == dual
    # Not equal to "none": the prompt's keys are those of the first forward.
    assert prefix != none
    # Without a prompt nothing is left of the block.
    none, prefix, dual = (
        generate(model, [], **options, rule=static(), cache=cache) for cache in CACHES
    )
    assert none == prefix == dual


@pytest.mark.parametrize("cache", CACHES)
def test_first_step_of_every_block_is_a_full_forward(model, cache):
    views: list[View] = []
    result = generate(
        model,
        PROMPT,
        **FULL,
        rule=threshold(0.6),
        cache=cache,
        observe=lambda view, _: views.append(view),
    )
    assert len(views) == result.forwards
    first_of_block = {view.first: view for view in reversed(views)}
    assert sorted(first_of_block) == [0, 8, 16, 24]
    for first, view in first_of_block.items():
        canvas = [
            token if step < view.forward else model.mask_id
            for token, step in zip(result.tokens, result.step_of_position, strict=True)
        ]
        logits = model.forward(PROMPT + canvas)[len(PROMPT) :]
        stats = row_statistics(logits, model.mask_id)
        assert torch.equal(stats.argmax[first : first + 8], view.argmax)
        assert torch.equal(stats.confidence[first : first + 8], view.confidence)


@pytest.mark.parametrize("cache", CACHES)
def test_eos_stop_is_a_shorter_run_of_the_same_request(tmp_path, cache):
    folder = write_random_checkpoint(tmp_path, seed=7, eos_gain=2.0)
    model = TinyLLaDA.from_folder(folder)
    for rule in (static(), threshold(0.6)):
        full = generate(model, PROMPT, **FULL, rule=rule, cache=cache)
        short = generate(
            model, PROMPT, **FULL | {"eos_stop": True}, rule=rule, cache=cache
        )
        end = full.tokens.index(model.eos_id) + 1
        assert short.tokens == full.tokens[:end]
        assert short.step_of_position == full.step_of_position[:end]
        assert short.forwards == max(short.step_of_position) + 1 < full.forwards


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("eotp", ["first", "paper"])
def test_eotp_with_learn2pd_on_a_real_forward(tmp_path, eotp, cache):
    folder = write_random_checkpoint(tmp_path, seed=7, eos_gain=2.0)
    model = TinyLLaDA.from_folder(folder)
    widths: list[int] = []
    result = generate(
        model,
        PROMPT,
        **FULL,
        rule=hand_filter(0.5),
        cache=cache,
        eotp=eotp,
        observe=lambda view, _: widths.append(len(view.masked)),
    )
    assert len(result.tokens) < 32  # (a predicted EOS may yet become another token)
    assert model.mask_id not in result.tokens
    assert result.forwards == max(result.step_of_position) + 1 == len(widths)


def test_options_are_checked(model):
    for options in (
        {"cache": "windows"},
        {"eotp": "yes"},
        {"block_length": 5},
        {"steps": 3},
    ):
        with pytest.raises(ValueError):
            generate(model, PROMPT, **FULL | {"rule": static()} | options)
    with pytest.raises(ValueError, match="left_to_right"):
        static("best")
