# SPDX-License-Identifier: Apache-2.0
"""The reference rules on worked examples, and whole requests against identities."""

from __future__ import annotations

import pytest
import torch
from reference.llada import KVStore, TinyLLaDA, write_random_checkpoint
from reference.procedures import (
    CACHES,
    STATIC_MODES,
    ReferenceResult,
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
MASK, EOS = 7, 6  # of the scripted model below
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


class ScriptedModel:
    """Says the same (token, probability) for a position at every step."""

    mask_id, eos_id = MASK, EOS

    def __init__(self, script: list[tuple[int, float]]) -> None:
        self.script = script
        self.calls: list[tuple[int, int, int]] = []

    def new_store(self, length: int) -> KVStore:
        return KVStore([torch.zeros(length, 1, 1)], [torch.zeros(length, 1, 1)])

    def forward(self, input_ids, positions, store=None) -> torch.Tensor:
        length = 0 if store is None else len(store)
        self.calls.append((positions[0], positions[-1] + 1, length))
        rows = []
        for position in positions:
            token, probability = self.script[position]
            row = torch.full((8,), (1 - probability) / 7)
            row[token] = probability
            rows.append(row.log())
        return torch.stack(rows)


def scripted(script: list[tuple[int, float]], **options) -> ReferenceResult:
    options = {"gen_length": 4, "block_length": 4, "rule": static()} | options
    return generate(ScriptedModel(script), [], **options)


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


# --- End of text, and upstream's mask id, on a scripted model --------------------


def test_eos_stop_waits_for_masks_to_its_left():
    script = [(1, 0.5), (2, 0.6), (EOS, 0.9), (3, 0.8)]
    assert scripted(script) == ReferenceResult([1, 2, EOS], 4, [3, 2, 0])
    script = [(1, 0.9), (EOS, 0.8), (3, 0.5), (3, 0.6)]
    assert scripted(script) == ReferenceResult([1, EOS], 2, [0, 1])
    # An EOS of the prompt ends nothing.
    result = generate(
        ScriptedModel([(1, 0.9)] * 5),
        [EOS],
        gen_length=4,
        block_length=4,
        rule=static(),
    )
    assert result.tokens == [1] * 4


@pytest.mark.parametrize("eotp", ["first", "paper"])
def test_eotp_cuts_after_the_first_eos_just_committed(eotp):
    script = [(1, 0.5), (EOS, 0.95), (2, 0.6), (EOS, 0.95)] + [(3, 0.9)] * 4
    result = scripted(
        script, gen_length=8, rule=threshold(0.9), eotp=eotp, eos_stop=False
    )
    assert result == ReferenceResult([1, EOS], 2, [1, 0])


def test_eotp_first_cuts_at_the_leftmost_sure_eos_of_the_active_block():
    script = [(1, 0.99), (EOS, 0.7), (EOS, 0.91), (EOS, 0.98)] + [(EOS, 0.985)] * 4
    options = {"gen_length": 8, "eos_stop": False}
    result = scripted(script, eotp="first", **options)
    # Cut after position 2, which commits next; the 0.7 is committed, not cut, then.
    assert result == ReferenceResult([1, EOS], 3, [0, 2])
    result = scripted(script, eotp="first", eot_threshold=0.6, **options)
    assert result == ReferenceResult([1, EOS], 2, [0, 1])
    assert scripted(script, eotp="first", eot_threshold=0.99, **options).forwards > 2


@pytest.mark.parametrize(
    ("cache", "eot_threshold", "ends"),
    [
        ("none", 0.9, [16, 8, 8]),  # the first sure end is at 6
        ("none", 0.95, [16, 12, 12]),  # at 8
        ("none", 1.0, [16, 16, 16]),
        ("prefix", 0.9, [16, 8, 8]),
        ("dual", 0.9, [16, 4, 4]),  # later steps compute the block alone
    ],
)
def test_eotp_canvas_cuts_behind_the_block_of_the_first_sure_eos(
    cache, eot_threshold, ends
):
    script = [(1, 0.6)] * 4 + [(EOS, 0.3), (2, 0.99), (EOS, 0.91), (EOS, 0.2)]
    model = ScriptedModel(script + [(EOS, 0.99)] * 8)
    generate(
        model,
        [],
        gen_length=16,
        block_length=4,
        rule=threshold(0.9),
        cache=cache,
        eotp="canvas",
        eot_threshold=eot_threshold,
        eos_stop=False,
    )
    assert [end for _, end, _ in model.calls[:3]] == ends


@pytest.mark.parametrize(("shift", "cut"), [(0, 8), (1, 12)])
def test_eotp_canvas_looks_at_rows_right_of_the_block_only(shift, cut):
    """With a shift, a row of the block predicts the first position behind it."""
    script = [(1, 0.6)] * 4 + [(2, 0.6)] * 12
    script[4 - shift], script[9 - shift] = (EOS, 0.95), (EOS, 0.95)
    model = ScriptedModel(script)
    options = {"gen_length": 16, "block_length": 4, "rule": threshold(0.99)}
    generate(model, [], eotp="canvas", shift=shift, eos_stop=False, **options)
    assert model.calls[1][1] == cut


def test_eotp_paper_cuts_at_the_most_confident_eos_of_the_canvas():
    script = [(1, 0.99), (2, 0.8), (EOS, 0.2), (2, 0.8)] + [(2, 0.5), (EOS, 0.3)] * 2
    options = {"gen_length": 8, "eos_stop": False}
    result = scripted(script, eotp="paper", **options)
    # Tie between 5 and 7: cut after 5. Then block 0 as usual, and its own EOS cuts.
    assert result.tokens == [1, 2, EOS] and result.forwards == 4
    sizes: list[int] = []
    scripted(
        [*script[:2], (1, 0.2), *script[3:6], (1, 0.5), (1, 0.5)],
        eotp="paper",
        observe=lambda view, _: sizes.append(len(view.masked)),
        **options,
    )
    assert sizes == [4, 4, 4, 4, 2, 2]


@pytest.mark.parametrize(
    ("cache", "calls"),
    [
        ("none", [(0, 10, 0), (0, 5, 0), (0, 5, 0)]),
        ("prefix", [(0, 10, 10), (2, 5, 5), (2, 5, 5)]),
        ("dual", [(0, 10, 10), (2, 5, 5), (2, 5, 5)]),
    ],
)
def test_eotp_cut_rows_are_neither_computed_nor_seen(cache, calls):
    script = [(0, 0.5)] * 2 + [(1, 0.5), (2, 0.6), (EOS, 0.9)] + [(3, 0.8)] * 5
    model = ScriptedModel(script)
    result = generate(
        model,
        [1, 1],
        gen_length=8,
        block_length=4,
        rule=static(),
        cache=cache,
        eotp="first",
        eos_stop=False,
    )
    assert result == ReferenceResult([1, 2, EOS], 3, [2, 1, 0])
    assert model.calls == calls  # first row, one past the last, length of the store


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


def test_mask_id_is_banned_unless_allowed():
    script = [(1, 0.5), (MASK, 0.9), (2, 0.6), (3, 0.8)]
    assert MASK not in scripted(script).tokens
    # Allowed: it wins every step, is chosen every step, and stays masked.
    result = scripted(script, forbid_mask=False)
    assert result == ReferenceResult([MASK] * 4, 4, [-1] * 4)
    with pytest.raises(RuntimeError, match="no progress"):
        scripted(script, forbid_mask=False, rule=threshold(0.9))
    # A mask left behind competes again in the next block, as upstream's loop has it.
    script = [(1, 0.5), (MASK, 0.55), (2, 0.6), (3, 0.8)]
    result = scripted(script, block_length=2, forbid_mask=False)
    assert result == ReferenceResult([MASK, MASK, 2, 3], 4, [-1, -1, 3, 2])


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
