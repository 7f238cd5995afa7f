# SPDX-License-Identifier: Apache-2.0
"""Chains: drafts that are verified one after the other, in branches of one forward."""

from __future__ import annotations

import torch

from vllm_dlm.strategies.base import Branches


def follow(
    branches: Branches, writes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Follow the chain of branches that the procedure goes through.

    Args:
        writes: [R, K, B] bool, its step on each branch.

    Returns:
        The last branch of the chain [R] int64; the drafts on the way [R, B] bool; the
        branch that confirmed each of them, and the number of its step, both [R, B]
        int64; how many steps these are, [R] int64.
    """
    rows, count, _ = writes.shape
    rank, evaluated = branches.rank[:, None], branches.masked.any(dim=2)
    number = torch.arange(count, device=rank.device)
    following = number + writes.sum(dim=2)
    drafts = (rank >= number[:, None]) & (rank < following[..., None])
    is_draft = branches.candidate == branches.tokens[:, None]
    agrees = ((writes == drafts) & (is_draft | ~writes)).all(dim=2)
    exists = evaluated.gather(1, following.clamp(max=count - 1)) & (following < count)
    moves = agrees & exists & evaluated

    best = torch.zeros(rows, dtype=torch.int64, device=rank.device)
    commit = torch.zeros_like(writes[:, 0])
    source = torch.zeros_like(branches.rank)
    ahead = torch.zeros_like(branches.rank)
    steps = torch.zeros_like(best)
    for branch in range(count):
        here = (best == branch) & moves[:, branch]
        best = torch.where(here, following[:, branch], best)
        taken = drafts[:, branch] & here[:, None]
        commit = commit | taken
        source = torch.where(taken, branch, source)
        ahead = torch.where(taken, steps[:, None], ahead)
        steps = steps + here
    return best, commit, source, ahead, steps
