# SPDX-License-Identifier: Apache-2.0
"""LoPA: try several ways to go on at once, and keep the one that makes most sure.

A step writes what is sure, as `multi_block` does by confidence with `push` at `each`:
that canvas is the anchor. Of the masks left in open blocks the `branches` - 1 surest
are drafts, and the next forward evaluates the anchor (branch 0) beside canvases of
which each has one draft more. The branch whose masks, those of its open blocks, have
the highest mean confidence is kept, the anchor on ties: its draft is written, and what
is sure on it, by the predictions that it was judged by.

Source: LoPA, arXiv 2512.16229, and zhijie-group/LoPA's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from vllm_dlm.strategies.base import (
    NOT_DRAFTED,
    AnyParams,
    Context,
    Decision,
    Params,
    Strategy,
    View,
    given,
    in_branch,
    ranks,
)
from vllm_dlm.strategies.in_flight import pushed, states
from vllm_dlm.strategies.presets import Preset

ON_DREAM = (
    "zhijie-group/LoPA, scale_dream_d2f",
    "D2F-Dream, branches 2 to 4, block_length canvas",
)


class LopaParams(Params):
    """Parameters of `Lopa`."""

    presets: ClassVar[Mapping[str, Preset]] = {
        "gsm8k": Preset({"threshold": 0.9, "block": 32, "open_at": 0.1}, *ON_DREAM),
        "math": Preset({"threshold": 0.9, "block": 16, "open_at": 0.1}, *ON_DREAM),
        "code": Preset({"threshold": 0.95, "block": 32, "open_at": 0.3}, *ON_DREAM),
    }

    branches: int = Field(
        default=4,
        ge=1,
        le=16,
        description=(
            "Canvases that a forward evaluates, the anchor among them. More cost more; "
            "with 1 nothing is tried."
        ),
    )
    threshold: float = Field(
        default=0.9,
        ge=0.0,
        le=2.0,
        description="Probability that a token must exceed to be written along with "
        "others. Lower is faster and less exact.",
    )
    block: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="Positions of one of the blocks that are in flight together, where "
        "`block_length` is longer; 0 for the model's own block length.",
    )
    open_at: float = Field(
        default=0.1,
        gt=0.0,
        le=1.0,
        description="Share of a block that must be written before the next is open.",
    )
    due_at: float = Field(
        default=0.95,
        ge=0.0,
        le=1.0,
        description="Share of a block from which on each step writes something of the "
        "next.",
    )


class Lopa(Strategy):
    """Write what is sure on the most promising of several canvases."""

    name = "lopa"
    paper = "arXiv 2512.16229 (LoPA)"
    summary = "sure tokens, on the draft canvas that makes the rest surest"
    Params = LopaParams
    needs = frozenset({"branches"})
    needs_branches = True
    heeds_patterns = True

    @classmethod
    def branches(cls, params: AnyParams) -> int:
        assert isinstance(params, LopaParams)
        return params.branches

    @classmethod
    def validate(cls, params: AnyParams, block_length: int, context: Context) -> None:
        full = ("prefix", "dual") if context.attention == "full" else ()
        if context.cache not in ("none", *full):
            raise ValueError(
                f"the strategy 'lopa' is not served with cache {context.cache!r}; set "
                f"one of {', '.join(('none', *full))}"
            )

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        row = {name: values[:, None, None] for name, values in row_params.items()}
        branches = given(view.branches, "branches")
        number = torch.arange(branches.masked.shape[1], device=view.masked.device)
        drafted = view.masks[:, None] & in_branch(
            branches.rank[:, None], number[:, None]
        )
        places = torch.arange(view.masked.shape[1], device=view.masked.device)
        length = torch.where(row["block"] > 0, row["block"], self.context.own_block)
        block = (places // length).expand_as(branches.masked)
        ours = (view.valid & (view.positions >= 0))[:, None].expand_as(block)
        decided = view.decided[:, None] | drafted
        is_open, is_due = states(decided, ours, block, row["open_at"], row["due_at"])

        # The branch that is kept, and what of it is sure.
        masks = branches.masked & is_open
        count = masks.sum(dim=2)
        mean = torch.where(masks, branches.confidence, 0.0).sum(dim=2) / count
        kept = torch.where(count > 0, mean, -1.0).argmax(dim=1)
        at = torch.arange(len(kept), device=kept.device), kept
        among, confidence = masks[at], branches.confidence[at]
        sure = among & (confidence > row["threshold"][:, 0])
        commit = pushed(among, sure, confidence, block[at], is_due[at], "each")

        candidate, draft = branches.candidate[at], drafted[at]
        left = among & ~commit
        rank = ranks(left, confidence)
        is_draft = left & (rank < row_params["branches"][:, None] - 1)
        return Decision(
            commit=commit | draft,
            new_tokens=torch.where(draft, branches.tokens, candidate),
            branch=torch.where(commit, kept[:, None], 0),
            draft_tokens=candidate,
            # Each in a branch of its own.
            draft_rank=torch.where(is_draft, -1 - rank, NOT_DRAFTED),
        )
