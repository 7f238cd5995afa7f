# SPDX-License-Identifier: Apache-2.0
"""Chains: drafts that are verified one after the other, in branches of one forward."""

from __future__ import annotations

import torch

from vllm_dlm.strategies.base import NOT_DRAFTED, Branches, Decision, ranks


def decided(branches: Branches, writes: torch.Tensor) -> Decision:
    """What the drafts that are right write, then one step more; and the next drafts.

    Args:
        writes: [R, K, B] bool, the step of the procedure on each branch.
    """
    best, commit, source, ahead, moves = _follow(branches, writes)
    rows = torch.arange(len(best), device=best.device)
    candidate = branches.candidate[rows, best]
    tokens = torch.where(commit, branches.tokens, candidate)
    last = writes[rows, best]
    left = branches.masked[rows, best] & ~last
    turn = branches.confidence[rows, best]
    if branches.later is not None and branches.part is not None:
        left = left | branches.later[rows, best]
        # Of two blocks the left one comes first, however sure the model is.
        turn = turn - 2.0 * branches.part
    rank = ranks(left, turn)
    return Decision(
        commit=commit | last,
        new_tokens=tokens,
        branch=torch.where(last, best[:, None], source),
        step_ahead=torch.where(last, moves[:, None], ahead),
        draft_tokens=candidate,
        draft_rank=torch.where(left, rank, NOT_DRAFTED),
    )


def _follow(
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
