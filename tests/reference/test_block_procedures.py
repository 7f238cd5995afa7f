# SPDX-License-Identifier: Apache-2.0
"""Block-causal decoding on models whose every answer is written down."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference.block_procedures import commits, generate_blocks
from reference.procedures import (
    ReferenceResult,
    Rule,
    View,
    dream,
    generate,
    static,
    threshold,
)

MASK, EOS, VOCAB = 7, 6, 8


class ScriptedModel:
    """Says the same (token, probability) in a row at every step.

    `calls` holds the ids and the visibility of every forward.
    """

    mask_id, eos_id = MASK, EOS

    def __init__(self, script: list[tuple[int, float]]) -> None:
        self.script = script
        self.calls: list[tuple[list[int], torch.Tensor]] = []

    def forward(self, input_ids, positions=None, store=None, visible=None):
        self.calls.append((list(input_ids), visible))
        rows = []
        for token, probability in self.script[: len(input_ids)]:
            row = torch.full((VOCAB,), (1 - probability) / (VOCAB - 1))
            row[token] = probability
            rows.append(row.log())
        return torch.stack(rows)

    def lengths(self) -> list[int]:
        return [len(ids) for ids, _ in self.calls]


class SeeingModel:
    """A row's logits are a hash of its position and of all that it sees."""

    mask_id, eos_id = MASK, EOS

    def forward(self, input_ids, positions=None, store=None, visible=None):
        rows = []
        for i in range(len(input_ids)):
            seen = [
                (j, token)
                for j, token in enumerate(input_ids)
                if visible is None or visible[i, j]
            ]
            generator = torch.Generator().manual_seed(hash((i, *seen)) % 2**40)
            rows.append(3 * torch.randn(VOCAB, generator=generator))
        return torch.stack(rows)


def decode(
    model: Any, prompt: list[int], rule: Rule | None = None, **options: Any
) -> tuple[ReferenceResult, list[View], list[list[int]]]:
    """The result, and what the rule saw and chose in every step."""
    views: list[View] = []
    choices: list[list[int]] = []

    def observe(view: View, chosen: list[int]) -> None:
        views.append(view)
        choices.append(sorted(chosen))

    options = {"max_tokens": 8, "block_length": 4} | options
    result = generate_blocks(
        model, prompt, rule=rule or static(), observe=observe, **options
    )
    return result, views, choices


def rising(length: int, token: int = 1) -> ScriptedModel:
    """Surer from row to row, always of one token: decoded from right to left."""
    return ScriptedModel([(token, 0.4 + 0.5 * i / length) for i in range(length)])


def counts(choices: list[list[int]]) -> list[int]:
    return [len(chosen) for chosen in choices]


# --- Which rows, and what they see ----------------------------------------------


@pytest.mark.parametrize("origin", ["start", "prompt"])
@pytest.mark.parametrize("length", range(1, 10))
def test_first_block_holds_the_tail_of_the_prompt(length, origin):
    model = rising(24)
    tail = length % 4 if origin == "start" else 0
    result, views, _ = decode(model, [2] * length, origin=origin, max_tokens=12)
    assert views[0].first == -tail
    assert views[0].masked.tolist() == [False] * tail + [True] * (4 - tail)
    assert {view.first for view in views} == set(range(-tail, 12, 4))
    # Each block is computed to its end, no further, and so often as it has masks.
    first_end = length - tail + 4
    assert model.lengths()[: 4 - tail] == [first_end] * (4 - tail)
    assert model.lengths()[4 - tail] == first_end + 4
    assert result.tokens == [1] * 12
    assert result.forwards == max(result.step_of_position) + 1 == len(model.calls)


def test_what_a_row_sees():
    model = rising(8)
    options = {"rule": static("left_to_right"), "block_length": 2, "max_tokens": 1}
    decode(model, [2, 3, 4], **options)
    decode(model, [2, 3, 4], **options, origin="prompt")
    decode(model, [2, 3, 4], **options, origin="prompt", context="causal")
    (_, start), (_, prompt), (_, causal) = model.calls
    assert start.int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
    ]
    # The prompt ends on a border: its first block is the shorter one.
    assert prompt.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
    ]
    assert causal.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize("shift", [0, 1])
def test_a_shorter_request_is_the_beginning_of_a_longer_one(shift):
    options = {"shift": shift, "rule": threshold(0.6), "eos_stop": False}
    whole, *_ = decode(SeeingModel(), [2, 3, 4, 5, 1], max_tokens=17, **options)
    for wanted in range(1, 17):
        part, *_ = decode(SeeingModel(), [2, 3, 4, 5, 1], max_tokens=wanted, **options)
        assert part.tokens == whole.tokens[:wanted]
        assert part.step_of_position == whole.step_of_position[:wanted]
        assert part.forwards == max(part.step_of_position) + 1


@pytest.mark.parametrize("rule", [threshold(0.5), threshold(1.1)])
def test_one_block_is_full_attention(rule):
    prompt = [2, 3, 4]
    blocks, *_ = decode(
        SeeingModel(), prompt, rule, max_tokens=9, block_length=12, eos_stop=False
    )
    full = generate(
        SeeingModel(), prompt, gen_length=9, block_length=9, rule=rule, eos_stop=False
    )
    assert blocks == full


def test_a_mask_token_of_the_prompt_is_text():
    model = rising(8)
    result, views, _ = decode(model, [MASK, 2, MASK], max_tokens=1)
    assert views[0].masked.tolist() == [False, False, False, True]
    assert result.tokens == [1] and model.calls[0][0] == [MASK, 2, MASK, MASK]


# --- Schedules ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "steps", "tail", "expected"),
    [
        ("even", 8, 0, [1] * 8),
        ("even", 3, 0, [3, 3, 2]),
        # Of the block length, not of the masks: 5 of them are 3 and the rest.
        ("even", 3, 3, [3, 2]),
        ("even", 8, 3, [1] * 5),
        ("even", 1, 3, [5]),
        ("rounded", 8, 0, [1] * 8),
        # 8/5, 6/4 (half to even: 2), 4/3, 3/2 (2), 1/1.
        ("rounded", 5, 0, [2, 2, 1, 2, 1]),
        # 6/4 (2), 4/3, 3/2 (2), 1/1.
        ("rounded", 4, 2, [2, 1, 2, 1]),
        # 5/2 (half to even: 2), 3/1.
        ("rounded", 2, 3, [2, 3]),
        # 3/8 rounds to nothing: such steps are dropped.
        ("rounded", 8, 5, [1] * 3),
    ],
)
def test_commits_per_step(schedule, steps, tail, expected):
    options = {"steps_per_block": steps, "schedule": schedule, "block_length": 8}
    result, views, choices = decode(
        rising(8), [2] * tail, max_tokens=8 - tail, **options
    )
    assert counts(choices) == expected
    assert [view.step for view in views] == list(range(len(expected)))
    assert {view.steps for view in views} == {steps}
    assert result.forwards == len(expected)


def test_after_its_steps_the_schedule_has_the_block():
    assert [commits("even", 8, 3, step, 8) for step in range(5)] == [3, 3, 2, 8, 8]
    assert commits("rounded", 8, 3, 3, 1) == 8


def test_threshold_of_at_least_the_schedule():
    probability = [0.95, 0.5, 0.6, 0.99, 0.7, 0.4, 0.3, 0.97]
    model = ScriptedModel([(1, p) for p in probability])
    rule = threshold(0.9, strict=True, at_least="scheduled")
    _, _, choices = decode(model, [], rule, block_length=8, steps_per_block=8)
    assert choices == [[0, 3, 7], [4], [2], [1], [5], [6]]
    _, _, choices = decode(model, [], rule, block_length=8, steps_per_block=4)
    assert choices == [[0, 3, 7], [2, 4], [1, 5], [6]]
    _, _, choices = decode(model, [], rule, block_length=8, steps_per_block=2)
    assert choices == [[0, 3, 4, 7], [1, 2, 5, 6]]


def test_dream_by_blocks_of_the_origin():
    rule = dream("maskgit_plus")
    options = {"block_length": 8, "max_tokens": 7}
    result, _, choices = decode(rising(8), [2], rule, **options)
    # 7 masks in 8 steps: int(7 (1 - .875125)) = int(.874), then
    # int(7 (1 - .75025 / .875125)) = int(.9989), int(7 (1 - .625375 / .75025)) = 1.
    assert counts(choices)[:3] == [0, 0, 1]
    assert sum(counts(choices)) == 7 and result.forwards == len(choices) == 8


# --- Ends -----------------------------------------------------------------------


def test_cut_at_max_tokens():
    # Blocks [0, 4) and [4, 8); the last two of each are written first.
    model = rising(8)
    result, *_ = decode(model, [2], max_tokens=5)
    assert result == ReferenceResult([1] * 5, 3 + 4, [2, 1, 0, 6, 5])
    result, *_ = decode(rising(8), [2], max_tokens=7)
    assert result.forwards == 7 and len(result.tokens) == 7
    # Left to right, nothing is computed that is not wanted.
    result, *_ = decode(rising(8), [2], static("left_to_right"), max_tokens=4)
    assert result == ReferenceResult([1] * 4, 4, [0, 1, 2, 3])


def test_stops_at_eos_once_all_left_of_it_is_final():
    script = [(1, 0.5), (2, 0.6), (EOS, 0.9), (EOS, 0.8), *[(3, 0.5)] * 4]
    result, *_ = decode(ScriptedModel(script), [])
    assert result == ReferenceResult([1, 2, EOS], 4, [3, 2, 0])
    result, *_ = decode(ScriptedModel(script), [], eos_stop=False)
    assert len(result.tokens) == 8
    result, *_ = decode(ScriptedModel(script), [], eos_ids={2, 3})
    assert result.tokens == [1, 2]
    # An EOS of the prompt ends nothing.
    result, *_ = decode(rising(8), [EOS, 2], max_tokens=3)
    assert result.tokens == [1, 1, 1]


@pytest.mark.parametrize("shift", [0, 1])
def test_cut_at_the_end_of_the_context(shift):
    model = rising(10)
    result, views, _ = decode(
        model, [2] * 5, max_model_len=10, max_tokens=20, shift=shift
    )
    assert result.tokens == [1] * 5
    assert max(model.lengths()) == 10
    assert len(views[-1].masked) == 2
    empty, *_ = decode(model, [2] * 5, max_model_len=5)
    assert empty == ReferenceResult([], 0, [])


# --- Shift, seeds and parts of a block ------------------------------------------


def numbered(length: int) -> ScriptedModel:
    """Row i says token i mod 5, surer from row to row."""
    return ScriptedModel([(i % 5, 0.4 + 0.5 * i / length) for i in range(length)])


def test_seed_is_the_first_token_of_a_block():
    model = numbered(12)
    result, views, choices = decode(model, [2] * 4, threshold(0.1), shift=1)
    # Row i predicts position i + 1; a seed's row is the last of the blocks before.
    assert result.tokens == [i % 5 for i in range(3, 11)]
    assert model.lengths() == [4, 8, 8, 12]
    assert [ids.count(MASK) for ids, _ in model.calls] == [0, 3, 0, 3]
    assert result.step_of_position == [0, 1, 1, 1, 2, 3, 3, 3]
    assert [view.masked.tolist() for view in views[:2]] == [
        [True],
        [False, True, True, True],
    ]
    assert [view.step for view in views] == [0, 1, 0, 1]
    assert [view.first for view in views] == [0, 0, 4, 4]
    assert choices[:2] == [[0], [1, 2, 3]]


@pytest.mark.parametrize("length", range(1, 9))
def test_no_seed_where_the_prompt_ends_inside_a_block(length):
    model = numbered(20)
    first, end = length // 4 * 4, length // 4 * 4 + 12
    result, *_ = decode(
        model, [2] * length, threshold(0.1), shift=1, max_tokens=end - length
    )
    assert result.tokens == [i % 5 for i in range(length - 1, end - 1)]
    seeds = [n for n in range(first, end, 4) if n >= length]
    blocks = [start + 4 for start in range(first, end, 4)]
    assert model.lengths() == sorted(seeds + blocks)


def test_a_seed_may_end_the_text():
    model = ScriptedModel([(1, 0.5)] * 3 + [(EOS, 0.5)] + [(2, 0.5)] * 8)
    result, *_ = decode(model, [2] * 4, shift=1)
    assert result == ReferenceResult([EOS], 1, [0])
    result, *_ = decode(model, [2] * 4, shift=1, max_tokens=1, eos_stop=False)
    assert result == ReferenceResult([EOS], 1, [0])


def test_the_seed_takes_the_first_step_of_the_schedule():
    _, views, choices = decode(
        numbered(8), [2] * 4, shift=1, steps_per_block=2, max_tokens=4
    )
    assert counts(choices) == [1, 2, 1]
    assert [view.scheduled for view in views] == [2, 2, 4]


def test_parts_of_a_block_from_the_left():
    model = rising(16)
    _, views, choices = decode(
        model, [2] * 3, threshold(0.1), block_length=8, sub_block_length=2, max_tokens=9
    )
    assert choices == [[3], [4, 5], [6, 7], [0, 1], [2, 3]]
    assert views[1].masked.nonzero()[:, 0].tolist() == [4, 5]
    assert len(views[1].masked) == 8
    # The whole block is computed for each.
    assert model.lengths() == [8, 8, 8, 16, 16]


def test_parts_after_a_seed():
    _, _, choices = decode(
        numbered(12), [2] * 4, threshold(0.1), sub_block_length=2, shift=1, max_tokens=4
    )
    assert choices == [[0], [1], [2, 3]]


def test_scheduled_writes_stay_in_their_part():
    _, _, choices = decode(
        rising(8), [], block_length=8, sub_block_length=4, steps_per_block=3
    )
    assert counts(choices) == [3, 1, 2, 2]


# --- The mask id, and options ---------------------------------------------------


def test_mask_id_is_banned_unless_allowed():
    script = [(1, 0.5), (MASK, 0.9), (2, 0.6), (3, 0.8), *[(4, 0.5)] * 4]
    result, *_ = decode(ScriptedModel(script), [])
    assert MASK not in result.tokens
    # Allowed: it wins every step and stays masked, and the block ends with its steps.
    result, *_ = decode(ScriptedModel(script), [], forbid_mask=False)
    assert result.tokens == [MASK] * 4 + [4] * 4
    assert result.step_of_position == [-1] * 4 + [4, 5, 6, 7]
    with pytest.raises(RuntimeError, match="no progress"):
        decode(ScriptedModel(script), [], threshold(0.9), forbid_mask=False)


def test_options_are_checked():
    for options in (
        {"origin": "end"},
        {"context": "none"},
        {"schedule": "odd"},
        {"steps_per_block": 5},
        {"steps_per_block": 0},
    ):
        with pytest.raises(ValueError):
            decode(rising(8), [2], **options)
    with pytest.raises(ValueError, match="prompt"):
        decode(rising(8), [], shift=1)
    with pytest.raises(ValueError, match="at_least"):
        threshold(0.9, at_least="two")
