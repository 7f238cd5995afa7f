# SPDX-License-Identifier: Apache-2.0
"""The rows that llada-forms learns from: prompt, canvas with holes, padding."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm_dlm.tasks.forms.problems import Problem, draw_problem
from vllm_dlm.tasks.forms.tools import describe
from vllm_dlm.tasks.forms.vocabulary import (
    BOS_ID,
    EOS_ID,
    MASK_ID,
    encode,
    encode_chat,
)

if TYPE_CHECKING:
    from vllm_dlm.training.tiny.masking import Batch

# Token budget of a batch: short rows come in larger batches.
BATCH_TOKENS = 2048
# Length of rows -> share of the batches.
ROWS = {64: 22, 80: 22, 96: 20, 112: 10, 144: 12, 208: 7, 320: 3, 512: 2}
# How much wider than its text a hole may be.
SLACKS = (0, 0, 1, 2, 3, 4, 6, 8, 12)
# <|endoftext|> right after a text counts like its tokens, the rest of the padding
# hardly, as in llada-tiny.
NUM_FULL_EOS = 2
PADDING_WEIGHT = 0.05


@dataclass(frozen=True)
class Row:
    """A problem in tokens.

    Args:
        prompt: Token ids of the prompt.
        canvas: Token ids of the canvas, its holes filled right.
        hole: For each position of the canvas: whether it lies in a hole.
        padding: For each position: whether it is padding of little weight.
    """

    prompt: list[int]
    canvas: list[int]
    hole: list[bool]
    padding: list[bool]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.canvas)

    def widen(self, length: int) -> Row:
        """The row with a longer canvas, whose rest is padding."""
        more = length - len(self)
        return replace(
            self,
            canvas=self.canvas + [EOS_ID] * more,
            hole=self.hole + [True] * more,
            padding=self.padding + [True] * more,
        )

    @property
    def masked(self) -> list[int]:
        """The canvas as a request has it: masks in the holes."""
        return [
            MASK_ID if hole else token
            for token, hole in zip(self.canvas, self.hole, strict=True)
        ]


def encode_prompt(problem: Problem) -> list[int]:
    """Token ids of a problem's prompt."""
    if not problem.is_chat:
        return [BOS_ID, *encode(problem.question)]
    turns = [(turn.role, turn.text) for turn in problem.turns]
    if problem.tools:
        turns.insert(0, ("tools", describe(problem.tools)))
    return encode_chat(turns)


def encode_row(problem: Problem, rng: random.Random) -> Row:
    """A problem in tokens; its holes are as wide as `rng` makes them."""
    row = Row(encode_prompt(problem), [], [], [])
    last = problem.pieces[-1]
    for piece in problem.pieces:
        ids = encode(piece.text)
        padding = [False] * len(ids)
        if piece.is_hole:
            slack = 0 if problem.exact else rng.choice(SLACKS)
            if problem.open_end and piece is last:
                slack = NUM_FULL_EOS
            ids += [EOS_ID] * slack
            padding += [index >= NUM_FULL_EOS for index in range(slack)]
        row.canvas.extend(ids)
        row.hole.extend([piece.is_hole] * len(ids))
        row.padding.extend(padding)
    return row


def make_batch(step: int, seed: int) -> Batch:
    """What a step learns from; the same for the same arguments."""
    import torch

    from vllm_dlm.training.tiny.masking import mask_canvas

    rng = random.Random(f"llada-forms-{seed}-{step}")
    [length] = rng.choices(list(ROWS), weights=list(ROWS.values()))
    num_rows = BATCH_TOKENS // length
    ids = torch.full((num_rows, length), EOS_ID)
    in_canvas = torch.zeros(num_rows, length, dtype=torch.bool)
    in_padding = torch.zeros_like(in_canvas)
    valid = torch.zeros_like(in_canvas)
    for index in range(num_rows):
        while True:
            problem = draw_problem(rng)
            row = encode_row(problem, rng)
            if len(row) <= length:
                break
        if problem.open_end and problem.pieces[-1].is_hole:
            row = row.widen(length)
        start = len(row.prompt)
        ids[index, : len(row)] = torch.tensor(row.prompt + row.canvas)
        in_canvas[index, start : len(row)] = torch.tensor(row.hole)
        in_padding[index, start : len(row)] = torch.tensor(row.padding)
        valid[index, : len(row)] = True
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    batch = mask_canvas(ids, in_canvas, in_padding, PADDING_WEIGHT, MASK_ID, generator)
    return replace(batch, valid=valid)
