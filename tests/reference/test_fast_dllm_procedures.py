# SPDX-License-Identifier: Apache-2.0
"""Fast-dLLM's loops with keys kept inside a block, on hand-worked cases and at limits.

`Remembering` writes tokens where a network writes keys, and says what it saw, so what a
step is made of can be written down; real networks show the limits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference.block_procedures import generate_blocks
from reference.checkpoints import write_checkpoint
from reference.fast_dllm_procedures import (
    CachedResult,
    generate_dream,
    generate_sub_blocks,
)
from reference.layers import KVStore
from reference.network import TinyModel
from reference.rules import Rule, View, dream, static, threshold

MASK, EOS, VOCAB = 7, 6, 8


@pytest.fixture(scope="module")
def dream_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder: Path = tmp_path_factory.mktemp("model") / "Dream-v0-Instruct-7B"
    return TinyModel.from_folder(write_checkpoint("dream", folder, seed=3))


@pytest.fixture(scope="module")
def v2_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder: Path = tmp_path_factory.mktemp("model") / "Fast_dLLM_v2_7B"
    return TinyModel.from_folder(write_checkpoint("fast_dllm_v2", folder, seed=3))


class Remembering:
    """Says the same (token, probability) in a row at every step.

    Its keys are the tokens that it was given. `seen` has, for each forward, the rows
    computed and what their keys were, after they were written; None is no key yet.
    """

    mask_id, eos_id = MASK, EOS

    def __init__(self, script: dict[int, tuple[int, float]]) -> None:
        self.script = script
        self.seen: list[tuple[int, int, list[int | None]]] = []

    def new_store(self, length: int) -> KVStore:
        keys = [torch.full((length, 1, 1), torch.nan)]
        return KVStore(keys, [key.clone() for key in keys])

    def forward(self, input_ids, positions, store, visible=None) -> torch.Tensor:
        store.keys[0][positions] = torch.tensor(input_ids).float()[:, None, None]
        keys = [None if k.isnan() else int(k) for k in store.keys[0].flatten()]
        self.seen.append((positions[0], positions[-1] + 1, keys))
        rows = []
        for position in positions:
            token, probability = self.script.get(position, (1, 0.5))
            row = torch.full((VOCAB,), (1 - probability) / (VOCAB - 1))
            row[token] = probability
            rows.append(row.log())
        return torch.stack(rows)

    def spans(self) -> list[tuple[int, int]]:
        return [(first, stop) for first, stop, _ in self.seen]


def rising(length: int, token: int = 1) -> Remembering:
    """Surer from row to row: decoded from right to left."""
    return Remembering({i: (token, 0.4 + 0.5 * i / length) for i in range(length)})


def decode(
    model: Any, prompt: list[int], rule: Rule, **options: Any
) -> tuple[CachedResult, list[View], list[list[int]]]:
    views: list[View] = []
    choices: list[list[int]] = []

    def observe(view: View, chosen: list[int]) -> None:
        views.append(view)
        choices.append(sorted(chosen))

    loop = generate_dream if "cache" in options else generate_sub_blocks
    result = loop(model, prompt, rule=rule, observe=observe, **options)
    return result, views, choices


# --- Dream ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cache", "later"), [("prefix", [(2, 10), (6, 10)]), ("dual", [(2, 6), (6, 10)])]
)
def test_rows_and_keys_of_dreams_steps(cache, later):
    model = rising(12)
    options = {"gen_length": 8, "block_length": 4, "steps": 4, "cache": cache}
    result, _, choices = decode(model, [2, 3], dream(), **options)
    # S = 2: the opening writes one token, step 1 the three others.
    assert choices == [[1, 2, 3], [1, 2, 3]]
    assert model.spans() == [(0, 10), later[0], (0, 10), later[1]] == result.rows
    assert result.tokens == [1] * 8 and result.forwards == 4
    assert result.step_of_position == [0, 1, 1, 1, 2, 3, 3, 3]
    # The opening's keys are masks, and those of step 1 have its token.
    assert model.seen[0][2] == [2, 3] + [7] * 8
    assert model.seen[1][2] == [2, 3, 1] + [7] * 7
    assert model.seen[3][2] == [2, 3] + [1] * 5 + [7] * 3


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize(
    ("steps", "later"),
    [(8, [0, 1, 1, 1, 1, 1, 2]), (4, [2, 2, 3]), (2, [7]), (3, [3, 4])],
)
def test_dreams_opening_uses_up_the_first_step(cache, steps, later):
    """From S = 8: shares of 7 masks are 1/7.008, 1/6.008, ...: the first is of none."""
    options = {"gen_length": 8, "block_length": 8, "steps": steps, "cache": cache}
    result, views, choices = decode(rising(12), [2], dream(), **options)
    assert [len(chosen) for chosen in choices] == later
    assert [view.step for view in views] == list(range(1, steps))
    assert result.forwards == steps and result.tokens == [1] * 8


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_block_of_one_step_keeps_its_masks(cache):
    options = {"gen_length": 8, "block_length": 4, "steps": 2, "cache": cache}
    result, _, choices = decode(rising(12), [2], dream(), **options)
    assert result.tokens == [1, 7, 7, 7, 1, 7, 7, 7]
    assert choices == [] and result.forwards == 2


def test_the_opening_writes_the_first_token_and_no_surer_one():
    script = {0: (3, 0.2), 1: (4, 0.99), 2: (5, 0.95), 3: (1, 0.2)}
    options = {"gen_length": 4, "block_length": 4, "cache": "dual"}
    result, views, choices = decode(Remembering(script), [2], threshold(0.9), **options)
    assert result.tokens == [3, 4, 5, 1]
    assert choices == [[1, 2], [3]] and result.step_of_position == [0, 1, 1, 2]
    # Position 1 + j is predicted by row j; the block's first row predicts for itself.
    assert views[0].argmax.tolist() == [4, 4, 5, 1]


def test_the_threshold_knows_no_last_step():
    options = {"gen_length": 4, "block_length": 4, "steps": 1, "cache": "dual"}
    result, _, _ = decode(rising(8), [2], threshold(1.0), **options)
    assert result.tokens == [1] * 4 and result.forwards == 4


def test_a_first_token_that_is_the_mask_id_is_left_to_its_own_row():
    script = {0: (MASK, 0.9), 1: (5, 0.9), 2: (4, 0.8), 3: (3, 0.7)}
    options = {"gen_length": 4, "block_length": 4, "steps": 4, "cache": "prefix"}
    result, views, _ = decode(Remembering(script), [2], dream(), **options)
    assert views[0].masked.all() and views[0].argmax.tolist() == [5, 5, 4, 3]
    assert result.tokens == [5, 5, 4, 3]
    # And so is every other position that chooses it in the last step.
    script[2] = (MASK, 0.8)
    result, _, _ = decode(Remembering(script), [2], dream(), **options)
    assert result.tokens == [5, 5, MASK, 3] and result.forwards == 4
    result, _, _ = decode(
        Remembering(script), [2], dream(), **options, forbid_mask=True
    )
    assert MASK not in result.tokens


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_block_of_two_steps_by_hand(dream_model: TinyModel, cache: str):
    model = dream_model
    prompt = [5, 17, 93, 41]
    options = {"gen_length": 8, "block_length": 8, "steps": 2, "cache": cache}
    result = generate_dream(model, prompt, rule=dream(), eos_stop=False, **options)
    store = model.new_store(12)
    row = [*prompt, *[model.mask_id] * 8]
    opening = model.forward(row, list(range(12)), store)
    row[4] = int(opening[3].argmax())
    second = model.forward(row[4:], list(range(4, 12)), store)
    assert result.tokens == [row[4], *second[:7].argmax(-1).tolist()]


def test_temperature_and_chance_are_the_openings_too():
    options = {"gen_length": 4, "block_length": 4, "steps": 2, "cache": "dual"}
    asked: list[tuple[list[int], int]] = []

    def draw(logits: torch.Tensor, positions: list[int], step: int) -> torch.Tensor:
        asked.append((positions, step))
        return torch.tensor([positions[0] + 1] * len(positions))

    result = generate_dream(
        rising(8),
        [2],
        rule=dream(),
        draw=draw,
        distribution=lambda logits: logits / 0.5,
        **options,
    )
    assert asked == [([1], 0), ([1, 2, 3, 4], 1)]
    assert result.tokens == [2, 2, 2, 2]


def test_dream_refuses_what_does_not_fit():
    for options, said in (
        ({"cache": "none"}, "'prefix' or 'dual'"),
        ({"cache": "dual", "gen_length": 6}, "multiple"),
        ({"cache": "dual", "steps": 1}, "number of blocks"),
    ):
        with pytest.raises(ValueError, match=said):
            decode(
                rising(8),
                [2],
                dream(),
                **{"gen_length": 8, "block_length": 4, **options},
            )


# --- Fast-dLLM v2 ----------------------------------------------------------------

BLOCKS = {"block_length": 8, "sub_block_length": 4}
RULES = {
    "static": static(),
    "threshold": threshold(0.9, strict=True),
    "dream": dream("maskgit_plus"),
}


def test_rows_of_the_sub_blocks():
    """Decoded from right to left: a sub-block's first token is its last."""
    model = rising(24)
    result, _, choices = decode(model, [2] * 8, static(), max_tokens=8, **BLOCKS)
    # The seed, which is the prompt's last row, writes the first sub-block's first
    # token; the block's first step is a whole one all the same. The second sub-block's
    # first token is written last, so all of its steps are whole.
    assert result.rows == [(0, 8), (8, 16), (8, 12), (8, 12), *[(8, 16)] * 4]
    assert choices == [[3], [2], [1], [7], [6], [5], [4]]
    # The prompt, and no commit of the last block.
    assert model.spans() == result.rows
    assert result.tokens == [1] * 8 and result.forwards == 8


def test_a_sub_block_is_computed_alone_once_its_first_token_is_written():
    model = Remembering({i: (1, 0.9 - 0.05 * (i % 8)) for i in range(16)})
    result, views, choices = decode(model, [2] * 3, static(), max_tokens=13, **BLOCKS)
    whole, first, second = (0, 8), (0, 4), (4, 8)
    assert result.rows == [
        whole,  # the prompt's tail fills the first sub-block but for one token
        whole,  # the second one's first token is written by the row to its left
        *[second] * 3,
        whole,  # the seed of the next block, which is the commit of this one
        (8, 16),
        *[(8 + first[0], 8 + first[1])] * 2,
        (8, 16),
        *[(12, 16)] * 3,
    ]
    assert choices == [[3], *[[j] for j in range(4, 8)], *[[j] for j in range(1, 8)]]
    # What a row outside of the sub-block would say is not known.
    assert views[2].confidence.tolist()[:4] == [0.0] * 4
    assert result.tokens == [1] * 13


def test_keys_stay_where_nothing_is_computed():
    model = Remembering({i: (1, 0.9 - 0.05 * (i % 8)) for i in range(16)})
    decode(model, [2] * 8, static(), max_tokens=8, **BLOCKS)
    keys = [keys[8:] for _, _, keys in model.seen]
    assert keys[0] == []  # the prompt sees itself alone
    assert keys[1] == [1] + [7] * 7  # whole
    assert keys[2] == [1, 1] + [7] * 6  # a sub-block: its keys are new
    assert keys[3] == [1, 1, 1] + [7] * 5
    assert keys[4] == [1, 1, 1, 1] + [7] * 4  # whole: the sub-block's last token too
    assert keys[5] == [1] * 5 + [7] * 3
    # Another block's keys are not those of the block before it.
    model = Remembering({i: (1, 0.9 - 0.05 * (i % 8)) for i in range(24)})
    decode(model, [2] * 8, static(), max_tokens=16, **BLOCKS)
    at = [keys for first, _, keys in model.seen if first == 16]
    assert at[0][8:] == [1] * 9 + [7] * 7


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("prompt", [1, 5, 8, 13, 16])
def test_refreshed_in_every_step_it_is_the_loop_without_keys(
    v2_model: TinyModel, name: str, prompt: int
):
    options = {"max_tokens": 21, "steps_per_block": 6, "eos_stop": False, **BLOCKS}
    prompt_ids = list(range(10, 10 + prompt))
    got = generate_sub_blocks(
        v2_model, prompt_ids, rule=RULES[name], refresh=True, **options
    )
    plain = generate_blocks(v2_model, prompt_ids, rule=RULES[name], shift=1, **options)
    assert got.tokens == plain.tokens
    assert got.step_of_position == plain.step_of_position
    assert got.forwards == plain.forwards == len(got.rows)


def test_kept_keys_change_texts_and_sub_blocks_as_long_as_blocks_do_not(
    v2_model: TinyModel,
):
    options = {"max_tokens": 24, "rule": static(), "eos_stop": False}
    changed = 0
    for first in range(10, 20):
        prompt = list(range(first, first + 8))
        kept = generate_sub_blocks(v2_model, prompt, **options, **BLOCKS)
        whole = generate_sub_blocks(v2_model, prompt, refresh=True, **options, **BLOCKS)
        changed += kept.tokens != whole.tokens
        options8 = {**options, "block_length": 8, "sub_block_length": 8}
        one_part = generate_sub_blocks(v2_model, prompt, **options8)
        assert one_part == generate_sub_blocks(
            v2_model, prompt, refresh=True, **options8
        )
        if changed == 2:
            return
    raise AssertionError("too few texts that change")


def test_the_end_of_the_text_and_of_the_context():
    script = {i: (EOS if i == 9 else 1, 0.9 - 0.01 * i) for i in range(16)}
    result, _, _ = decode(
        Remembering(script), [2] * 8, static(), max_tokens=8, **BLOCKS
    )
    assert result.tokens == [1, 1, EOS]
    result, _, _ = decode(
        rising(16), [2] * 8, static(), max_tokens=8, max_model_len=13, **BLOCKS
    )
    assert result.tokens == [1] * 5 and max(stop for _, stop in result.rows) == 13


def test_a_model_that_only_says_the_mask_makes_no_progress():
    model = Remembering({i: (MASK, 0.9) for i in range(16)})
    options = {"max_tokens": 8, "forbid_mask": False, **BLOCKS}
    with pytest.raises(RuntimeError, match="progress"):
        decode(model, [2] * 8, threshold(0.9), **options)
    result, _, _ = decode(model, [2] * 8, static(), **options)
    assert result.tokens == [MASK] * 8
