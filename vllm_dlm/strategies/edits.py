# SPDX-License-Identifier: Apache-2.0
"""What deletions and insertions make of a block: its tokens move, its length stays.

A part of the strategy `levenshtein`, as fixed-shape tensor operations: no step waits
for the device, and all of it can be compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_dlm.strategies.base import Context, EditTokens, View


def edit_tokens(context: Context) -> EditTokens:
    """Of the model.

    Raises:
        ValueError: it has none.
    """
    if context.edit_tokens is None:
        raise ValueError(
            "strategy 'levenshtein' is for models that delete and insert, as LLaDA2.2: "
            "the config.json of this one has no delete_token_id and split_token_id. "
            "Choose 'joint', which changes tokens in place, or 'threshold'"
        )
    return context.edit_tokens


def factors(block_length: int) -> torch.Tensor:
    """[B] int64: odd numbers, the same in each process, for `number`."""
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randint(1 << 62, (block_length,), generator=generator) + 1


def number(view: View, tokens: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """[R] int64: one number of the tokens [R, B] of a block, of 64 bits.

    Blocks that differ have different ones, but for one pair in 2^63 or so.
    """
    return (torch.where(view.valid, tokens + 1, 0) * factors).sum(dim=1)


class Edited(NamedTuple):
    """Blocks [R, B] after edits; the prompt's part and what does not exist is empty."""

    tokens: torch.Tensor
    """[R, B] int64; of no meaning where masked."""
    masked: torch.Tensor
    """[R, B] bool."""
    original: torch.Tensor
    """[R, B] bool: came from a position that has this mark."""


def edited(
    view: View, write: torch.Tensor, placed: torch.Tensor, edits: EditTokens
) -> Edited:
    """Carry out what is written.

    `delete` takes its position away, `insert` becomes a mask and what stood there. What
    is right of them moves; what falls behind the end is gone, what is missing there is
    masked anew.

    Args:
        view: the block; `state["original"]` holds the marks.
        write: [R, B] bool: positions of the output that are written.
        placed: [R, B] int64: the tokens, written and left.
    """
    output = view.decided | view.masks
    deletes, inserts = (output & write & (placed == token) for token in edits)
    width = output.shape[1]
    counts = torch.where(output, 1 + inserts.long() - deletes.long(), 0)
    # The output's positions follow each other, the prompt's before them.
    offsets = torch.arange(width, device=output.device)
    begin = torch.where(output, offsets, width).amin(dim=1, keepdim=True)
    end = begin + output.sum(dim=1, keepdim=True)
    place = begin + counts.cumsum(dim=1) - counts
    original = view.state["original"]
    open_ = view.masks & ~write

    def to(place: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
        """Where a column goes: behind the block if nowhere."""
        return torch.where(exists & (place < end), place, width)

    def moved(
        one: torch.Tensor, two: torch.Tensor, missing: torch.Tensor
    ) -> torch.Tensor:
        """[R, B] of first and second tokens [R, B] at their places."""
        room = missing.expand(len(output), width + 1).clone()
        room.scatter_(1, to(place, output & ~deletes), one)
        room.scatter_(1, to(place + 1, inserts), two)
        return room[:, :width]

    yes, no = torch.ones_like(output[:1, :1]), torch.zeros_like(output[:1, :1])
    inside = (offsets >= begin) & (offsets < end)
    return Edited(
        moved(placed, view.tokens, torch.zeros_like(placed[:1, :1])),
        moved(open_ | inserts, view.masks, yes) & inside,
        moved(original & ~inserts, original, no),
    )
