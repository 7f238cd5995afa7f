# SPDX-License-Identifier: Apache-2.0
"""KV policies of full-attention (class A) models: which rows a step recomputes.

In a class A model every token's keys and values depend on the whole canvas, so only
`none` is exact. `prefix` and `dual` are Fast-dLLM's approximations (arXiv 2505.22618):
one full forward at the start of a block (its logits are the block's first step), then

- `prefix`: keys left of the block stay as they are; block and everything to its right
  are recomputed;
- `dual`: only the block's rows are recomputed, keys on both sides stay.

Models of the other classes need no policy: the KV of a finished block is final, and a
forward computes what is not final yet, up to the active block's end.
"""

from __future__ import annotations

from typing import NamedTuple

POLICIES = ("none", "prefix", "dual")


class Rows(NamedTuple):
    """One request's rows of a forward, in absolute positions."""

    start: int
    """First position computed."""
    end: int
    """One past the last position computed."""


def plan_rows(
    policy: str,
    refresh: bool,
    block_start: int,
    block_length: int,
    canvas_end: int,
    shift: int = 0,
) -> Rows:
    """Rows to compute in the next forward of a class A request.

    Args:
        policy: "none", "prefix" or "dual".
        refresh: the active block's surroundings have not been computed yet.
        block_start: absolute position of the active block's first token.
        block_length: B; the last block of a canvas may be shorter.
        canvas_end: one past the canvas' last position.
        shift: with 1, the block's first token is predicted by the row to its left,
            which is computed along.
    """
    if refresh or policy == "none":
        return Rows(0, canvas_end)
    start = max(block_start - shift, 0)
    if policy == "prefix":
        return Rows(start, canvas_end)
    return Rows(start, min(block_start + block_length, canvas_end))


def block_start(num_tokens: int, block_length: int, origin: int) -> int:
    """Position of the first token of the block that holds position `num_tokens`.

    Args:
        num_tokens: tokens so far, the prompt's included.
        origin: where blocks are counted from, at most `num_tokens`.
    """
    return origin + (num_tokens - origin) // block_length * block_length


def text_end(num_tokens: int, block_length: int, origin: int) -> int:
    """End of the block that holds the last of `num_tokens` tokens."""
    return block_start(num_tokens + block_length - 1, block_length, origin)


def canvas_width(num_tokens: int, block_length: int, max_canvas: int) -> int:
    """Width of the next canvas of a request, in whole blocks.

    The references denoise whole blocks and cut afterwards, so the width is the wanted
    number of tokens rounded up to the block, at most `max_canvas` rounded down to it
    (but one block at least).
    """
    widest = max(max_canvas // block_length, 1) * block_length
    return min(-(-num_tokens // block_length) * block_length, widest)


def steps_per_block(steps: int | None, width: int, block_length: int) -> int:
    """Denoise steps of one block under a budget for the whole canvas.

    LLaDA splits `steps` evenly over the blocks; None is one token per step. More steps
    than positions would leave steps without work, so B is the most.
    """
    if steps is None:
        return block_length
    num_blocks = max(width // block_length, 1)
    return min(max(steps // num_blocks, 1), block_length)
