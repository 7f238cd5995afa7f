# SPDX-License-Identifier: Apache-2.0
"""LLaDA2.1's loop: hand-worked blocks, and the rule `joint` in the general loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference.block_procedures import generate_blocks
from reference.checkpoints import write_checkpoint
from reference.llada21 import NeverEnds, generate_llada21
from reference.network import TinyModel
from reference.rewriting_rules import joint
from tiers import fast

MASK, EOS, VOCAB = 7, 6, 8


class Scripted:
    """In forward f it says `script[f]`: (token, probability) for each block position.

    The last entry is repeated.
    """

    mask_id, eos_id = MASK, EOS

    def __init__(self, *script: list[tuple[int, float]]) -> None:
        self.script = list(script)
        self.rows: list[list[int]] = []

    def forward(self, input_ids, positions=None, store=None, visible=None):
        said = self.script[min(len(self.rows), len(self.script) - 1)]
        self.rows.append(list(input_ids))
        said = [(1, 0.5)] * (len(input_ids) - len(said)) + said
        rows = []
        for token, probability in said:
            row = torch.full((VOCAB,), (1 - probability) / (VOCAB - 1))
            row[token] = probability
            rows.append(row.log())
        return torch.stack(rows)


def decode(model: Any, prompt: list[int], **options: Any) -> tuple[list[int], int]:
    usual = {"max_tokens": 4 - len(prompt) % 4, "block_length": 4}
    numbers = {"mask_threshold": 0.7, "edit_threshold": 0.5, "max_post_steps": 16}
    return generate_llada21(model, prompt, **(usual | numbers | options))


def test_filled_edited_and_closed():
    model = Scripted(
        [(1, 0.8), (2, 0.6), (3, 0.9), (4, 0.2)],
        # 5 replaces 1; 3 stays, for .45 is not enough; the best mask is written
        [(5, 0.6), (2, 0.65), (0, 0.45), (4, 0.3)],
        [(5, 0.9), (2, 0.9), (3, 0.9), (4, 0.9)],
        [(5, 0.9), (2, 0.9), (0, 0.9), (4, 0.9)],
        [(5, 0.9), (2, 0.9), (0, 0.9), (4, 0.9)],
    )
    assert decode(model, []) == ([5, 2, 0, 4], [5])
    assert model.rows[1:] == [
        [1, MASK, 3, MASK],
        [5, 2, 3, MASK],
        [5, 2, 3, 4],
        [5, 2, 0, 4],
    ]


@pytest.mark.parametrize(("most", "forwards"), [(0, 1), (1, 2), (2, 3), (5, 6)])
def test_edits_that_never_rest_are_counted(most: int, forwards: int):
    first, second = [(1, 0.9)] * 4, [(2, 0.9)] * 4
    model = Scripted(*[first, second] * 4)
    tokens, spent = decode(model, [], max_post_steps=most)
    assert spent == [forwards] and tokens == [1 + (forwards + 1) % 2] * 4


def test_an_edit_that_chooses_the_mask_id_opens_the_position_again():
    model = Scripted(
        [(1, 0.9)] * 4,
        [(1, 0.9), (MASK, 0.9), (1, 0.9), (1, 0.9)],
        [(1, 0.9), (3, 0.6), (1, 0.9), (1, 0.9)],
    )
    # The third forward began with a mask: two count, the second and the fourth.
    assert decode(model, [], max_post_steps=2) == ([1, 3, 1, 1], [4])
    assert model.rows[2] == [1, MASK, 1, 1]


def test_the_prompt_stays_and_the_text_ends_with_its_block():
    model = Scripted([(5, 0.9), (EOS, 0.9), (1, 0.9), (2, 0.9)])
    assert decode(model, [3], max_tokens=7) == ([EOS], [2])
    assert model.rows[-1][0] == 3
    assert decode(model, [3], max_tokens=3, stops=False) == ([EOS, 1, 2], [2])
    with pytest.raises(NeverEnds):
        decode(Scripted([(MASK, 0.9)] * 4), [])


@pytest.mark.parametrize(
    ("mask", "edit", "most"), fast((0.3, 0.1, 3), of=((0.3, 0.1, 3), (0.05, 0.05, 16)))
)
def test_the_general_loop_with_joint_is_this_one(
    tmp_path: Path, mask: float, edit: float, most: int
):
    """Tokens and forwards; the mask id is chosen by this model now and then."""
    numbers = (mask, edit, most)
    folder = write_checkpoint("llada2", tmp_path / "LLaDA2.1-mini", seed=2)
    model = TinyModel.from_folder(folder)
    names = ("mask_threshold", "edit_threshold", "max_post_steps")
    ended, masked = 0, 0
    for length in range(1, 20, 2):
        prompt = [(7 * i + length) % 100 for i in range(length)]
        options: dict[str, Any] = {"max_tokens": 16 - length % 8, "block_length": 8}
        try:
            wanted = generate_llada21(
                model,
                prompt,
                **options,
                **dict(zip(names, numbers, strict=True)),
                stops=False,
            )
        except NeverEnds:
            continue
        ended += 1

        def observe(view: Any, chosen: Any) -> None:
            nonlocal masked
            masked += bool((view.argmax == model.mask_id).any())

        got = generate_blocks(
            model,
            prompt,
            rule=joint(*numbers),
            forbid_mask=False,
            eos_stop=False,
            observe=observe,
            **options,
        )
        assert (got.tokens, got.forwards) == (wanted[0], sum(wanted[1]))
    assert ended > 5 and masked
