# SPDX-License-Identifier: Apache-2.0
"""Credit that tokens have earned at each position of a block, from step to step."""

from __future__ import annotations

import torch

from vllm_dlm.strategies.base import StateField, View

CREDITED = 64
"""Tokens of each position that can have credit at a time.

A step adds at most one, so that in blocks of up to 64 none is ever dropped. In longer
ones, the least credit makes room.
"""


def state(block_length: int) -> dict[str, StateField]:
    """What a block keeps: tokens, and their credit, 0 where there is no such token."""
    shape = (block_length, min(block_length, CREDITED))
    return {"tokens": StateField(shape, torch.int32), "credit": StateField(shape)}


def earn(
    view: View, earned: torch.Tensor, decay: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add what the candidates of masked positions have earned to their credit.

    Args:
        view: the step's, with `state`.
        earned: [R, B] float32.
        decay: [R] float32: the share of earlier credit that is kept.

    Returns:
        tokens [R, B, K] int64 that have credit, and theirs [R, B, K] float32; 0 where
        the place is free.
    """
    tokens = view.state["tokens"].long()
    credit = view.state["credit"] * decay[:, None, None]
    held = (tokens == view.candidate[..., None]) & (credit > 0)
    known = held.any(dim=-1, keepdim=True)
    place = torch.where(
        known, held.int().argmax(dim=-1, keepdim=True), credit.argmin(-1, keepdim=True)
    )
    total = earned[..., None] + torch.where(known, credit.gather(2, place), 0.0)
    masked = view.masked[..., None]
    return (
        torch.where(
            masked, tokens.scatter(2, place, view.candidate[..., None]), tokens
        ),
        torch.where(masked, credit.scatter(2, place, total), credit),
    )


def of(
    wanted: torch.Tensor,
    probabilities: torch.Tensor,
    tokens: torch.Tensor,
    credit: torch.Tensor,
) -> torch.Tensor:
    """[R, B]: the probabilities of tokens [R, B]; 0 for one that has earned nothing.

    Such a token was as good as impossible.

    Args:
        probabilities: [R, B, K] float32, of `tokens`.
    """
    held = (tokens == wanted[..., None]) & (credit > 0)
    return torch.where(held, probabilities, 0.0).amax(dim=-1)
