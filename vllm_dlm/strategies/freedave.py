# SPDX-License-Identifier: Apache-2.0
"""FreeDave: draft several steps ahead, verify them in one forward, lose nothing.

Each decision writes what sequential decoding (one token a step, the most confident)
would write, and drafts the masks left in the order of their confidence. The next
forward evaluates `drafts` canvases: the canvas itself (branch 0) and branch j, which
has the first j drafts written. From branch 0 on: if what sequential decoding does on a
branch is to write the very next draft, that draft is right, and the branch that has it
is the canvas sequential decoding would be at. The chain goes on there. Where it breaks,
the branch's own choice is written. So every forward writes one token at least, and the
text is that of sequential decoding.

With `threshold` (freedave++) a step of the procedure that is followed writes every
token that is sure, as the strategy `threshold` does; here a branch is taken over only
if its drafts are exactly what such a step writes, so that this is lossless too.

Source: FreeDave, arXiv 2510.00294, and cychomatica/FreeDave's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from vllm_dlm.strategies.base import (
    NOT_DRAFTED,
    AnyParams,
    Branches,
    Context,
    Decision,
    Params,
    Strategy,
    View,
    best_of,
    given,
    ranks,
)
from vllm_dlm.strategies.presets import Preset


class FreeDaveParams(Params):
    """Parameters of `FreeDave`."""

    presets: ClassVar[Mapping[str, Preset]] = {
        name: Preset(
            {"drafts": drafts, "threshold": threshold},
            f"cychomatica/FreeDave, eval/scripts/eval_{name.split('_')[0]}.sh",
            f"block_length {block_length}",
        )
        for name, drafts, threshold, block_length in (
            ("llada", 4, 2.0, 32),
            ("llada_plus", 4, 0.95, 32),
            ("dream", 8, 2.0, 32),
            ("dream_plus", 8, 0.95, 32),
            ("trado", 8, 2.0, 4),
            ("trado_plus", 8, 0.9, 4),
        )
    }

    drafts: int = Field(
        default=4,
        ge=1,
        le=16,
        description=(
            "Canvases that one forward evaluates, which is the most tokens it can "
            "write one by one. More saves forwards and makes each of them dearer; 1 "
            "drafts nothing."
        ),
    )
    threshold: float = Field(
        default=2.0,
        gt=0.0,
        le=2.0,
        description=(
            "Least probability at which a token is written along with others. Above "
            "1 the text is that of one token per step, otherwise that of the strategy "
            "threshold (freedave++)."
        ),
    )


class FreeDave(Strategy):
    """Write the drafts that sequential decoding would have written, and one step."""

    name = "freedave"
    paper = "arXiv 2510.00294 (FreeDave)"
    summary = "one token per step, several steps per forward: drafted, then verified"
    Params = FreeDaveParams
    needs = frozenset({"branches"})

    @classmethod
    def branches(cls, params: AnyParams) -> int:
        assert isinstance(params, FreeDaveParams)
        return params.drafts

    @classmethod
    def validate(cls, params: AnyParams, block_length: int, context: Context) -> None:
        exact = ("none", "prefix", "dual") if context.attention == "full" else ("none",)
        if context.cache not in exact:
            raise ValueError(
                f"the strategy 'freedave' does several steps in one forward, and with "
                f"cache {context.cache!r} the keys of a step depend on how many "
                f"forwards were before it: set cache to {' or '.join(map(repr, exact))}"
                ", or use 'threshold'"
            )

    def reference_steps(self, params: AnyParams, steps: int) -> int | None:
        """Those of one token per step, which `static` counts out as well."""
        assert isinstance(params, FreeDaveParams)
        return self.block_length if params.threshold > 1 else None

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        branches = given(view.branches, "branches")
        writes = _step(branches, row_params["threshold"])
        best, commit, source, ahead, moves = _verify(branches, writes)

        rows = torch.arange(len(best), device=best.device)
        candidate = branches.candidate[rows, best]
        tokens = torch.where(commit, branches.tokens, candidate)
        last = writes[rows, best]
        left = branches.masked[rows, best] & ~last
        rank = ranks(left, branches.confidence[rows, best])
        commit = commit | last
        return Decision(
            commit=commit,
            new_tokens=tokens,
            branch=torch.where(last, best[:, None], source),
            step_ahead=torch.where(last, moves[:, None], ahead),
            draft_tokens=candidate,
            draft_rank=torch.where(left, rank, NOT_DRAFTED),
        )


def _step(branches: Branches, threshold: torch.Tensor) -> torch.Tensor:
    """[R, K, B] bool: what a step of the followed procedure writes on each branch."""
    masked = branches.masked
    sure = masked & (branches.confidence >= threshold[:, None, None])
    best = best_of(masked, branches.confidence)
    return torch.where(sure.any(dim=2, keepdim=True), sure, best)


def _verify(
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
