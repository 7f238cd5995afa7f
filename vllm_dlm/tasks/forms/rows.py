# SPDX-License-Identifier: Apache-2.0
"""Problems of llada-forms in tokens: a prompt, and a canvas with holes."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from vllm_dlm.tasks.forms.problems import Problem
from vllm_dlm.tasks.forms.tools import describe
from vllm_dlm.tasks.forms.vocabulary import (
    BOS_ID,
    EOS_ID,
    MASK_ID,
    encode,
    encode_chat,
)

# How much wider than its text a hole may be.
SLACKS = (0, 0, 1, 2, 3, 4, 6, 8, 12)
# <|endoftext|> right after a text counts like its tokens, the rest is padding.
NUM_FULL_EOS = 2


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
