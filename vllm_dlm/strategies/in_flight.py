# SPDX-License-Identifier: Apache-2.0
"""Blocks in flight: which blocks of a span are begun, and what a step writes in them.

A span is what a strategy decides together. Tensors are [..., B]: B positions of it.
"""

from __future__ import annotations

from typing import Literal

import torch

from vllm_dlm.strategies.base import best_of


def states(
    decided: torch.Tensor,
    ours: torch.Tensor,
    block: torch.Tensor,
    open_at: torch.Tensor,
    due_at: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., B] bool each: positions of open blocks, and of due ones.

    Args:
        decided: [..., B] bool: positions of the output that hold a token.
        ours: [..., B] bool: all positions of the output.
        block: [..., B] int64: the block of each position, from 0.
        open_at, due_at: [..., 1]: shares of a block that must be written, for the next
            one to be open and due.
    """
    counted = ours.double()
    size = torch.zeros_like(counted).scatter_add(-1, block, counted)
    written = torch.zeros_like(counted).scatter_add(-1, block, decided.double())
    closes = written < open_at.double() * size
    is_due = written >= due_at.double() * size
    is_open = closes.cumsum(dim=-1) - closes.long() == 0
    # The one before: nothing stands before the first.
    is_due = torch.cat([torch.ones_like(is_due[..., :1]), is_due[..., :-1]], dim=-1)
    return is_open.gather(-1, block), is_due.gather(-1, block)


def pushed(
    among: torch.Tensor,
    sure: torch.Tensor,
    score: torch.Tensor,
    block: torch.Tensor,
    is_due: torch.Tensor,
    where: Literal["first", "each"],
) -> torch.Tensor:
    """[..., B] bool: what a step writes, `sure` and what it writes in any case.

    Args:
        among: [..., B] bool: masks of open blocks.
        sure: [..., B] bool: those of them that are written anyway.
        score: [..., B]: the higher, the surer; ties go to the lowest position.
        block: [..., B] int64: the block of each position, from 0.
        is_due: [..., B] bool: positions of due blocks.
        where: "first": the best of all, and of the first block with a mask, if nothing
            else of that is written. "each": of each due block of which nothing is sure.
    """
    places = torch.arange(among.shape[-1], device=among.device)
    commit = sure
    if where == "first":
        commit = commit | best_of(among, score)
        lowest = torch.where(among, block, len(places)).amin(dim=-1, keepdim=True)
        is_due = block == lowest
    idle = is_due & ~_by_block(commit.long(), block, "amax").bool()
    top = _by_block(torch.where(among, score, -torch.inf), block, "amax")
    is_top = among & idle & (score == top)
    first = _by_block(torch.where(is_top, places, len(places)), block, "amin")
    return commit | (is_top & (places == first))


def _by_block(values: torch.Tensor, block: torch.Tensor, how: str) -> torch.Tensor:
    """[..., B]: the least ("amin") or greatest ("amax") value of each one's block."""
    found = torch.zeros_like(values)
    found = found.scatter_reduce(-1, block, values, how, include_self=False)
    return found.gather(-1, block)
