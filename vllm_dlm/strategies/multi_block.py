# SPDX-License-Identifier: Apache-2.0
"""Multi-block decoding: several blocks in flight, each begun before the last is full.

What the engine decodes together, as a rule the whole canvas, is divided into blocks of
`block` positions. A block is **open** when of every block left of it a share of at
least `open_at` is written, and **due** when of the one before it a share of at least
`due_at` is. A step writes every masked i of the open blocks that is sure: by entropy,
H_i <= threshold, or by confidence, c_i > threshold. Then, so that text is written:

    push first   the surest position of all open blocks; and that of the first block
                 with a mask, if nothing of that block is written otherwise (d3LLM)
    push each    the surest position of each due block of which nothing is sure (D2F)

The first block with a mask is always due. With `cut_at_end` the canvas ends behind the
first end of text that is written, in whatever block that is.

Sources: d3LLM, arXiv 2601.07568 and hao-ai-lab/d3LLM; Discrete Diffusion Forcing, arXiv
2508.09192.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from vllm_dlm.strategies.base import (
    Context,
    Decision,
    Params,
    Strategy,
    View,
    given,
)
from vllm_dlm.strategies.in_flight import pushed, states
from vllm_dlm.strategies.multi_block_presets import PRESETS
from vllm_dlm.strategies.presets import Preset


class MultiBlockParams(Params):
    """Parameters of `MultiBlock`."""

    presets: ClassVar[Mapping[str, Preset]] = PRESETS

    block: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description=(
            "Positions of one of the blocks that are in flight together; 0 for the "
            "model's own block length, the only one with block attention."
        ),
    )
    by: Literal["entropy", "confidence"] = Field(
        default="entropy",
        description=(
            "What makes a token sure: little entropy of its distribution (d3LLM), or "
            "its own probability (D2F, with `threshold` at 0.9)."
        ),
    )
    threshold: float = Field(
        default=0.5,
        ge=0.0,
        le=100.0,
        description=(
            "By entropy, the most nats at which a token is written; by confidence, the "
            "probability that it must exceed."
        ),
    )
    open_at: float = Field(
        default=0.1,
        gt=0.0,
        le=1.0,
        description=(
            "Share of a block that must be written before sure tokens of the next are. "
            "At 1 one block is in flight at a time."
        ),
    )
    due_at: float = Field(
        default=0.95,
        ge=0.0,
        le=1.0,
        description=(
            "Share of a block from which on the next one is due: where `push` is "
            "`each`, something of it is written in every step."
        ),
    )
    push: Literal["first", "each"] = Field(
        default="first",
        description="Where a step writes the surest token if none is sure: see above.",
    )
    cut_at_end: bool = Field(
        default=True,
        description="End the canvas behind the first end of text that is written.",
    )


class MultiBlock(Strategy):
    """Write what is sure in several blocks at once, the left ones ahead."""

    name = "multi_block"
    paper = "arXiv 2601.07568 (d3LLM), 2508.09192 (D2F)"
    summary = "sure tokens of several blocks, each begun before the last is full"
    Params = MultiBlockParams
    needs = frozenset({"entropy"})
    scope = "blocks"

    params: MultiBlockParams

    def __init__(self, params: Any, block_length: int, context: Context) -> None:
        super().__init__(params, block_length, context)
        if self.params.by == "confidence":
            self.needs = frozenset()

    @classmethod
    def validate(cls, params: Any, block_length: int, context: Context) -> None:
        own = context.own_block
        if context.attention == "block" and params.block not in (0, own):
            raise ValueError(
                f"block {params.block}: this model's blocks have {own} positions, and "
                "none sees the ones behind it; leave `block` out"
            )

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        row = {name: values[:, None] for name, values in row_params.items()}
        places = torch.arange(view.masked.shape[1], device=view.masked.device)
        length = torch.where(row["block"] > 0, row["block"], self.context.own_block)
        block = places // length
        ours = view.valid & (view.positions >= 0)
        is_open, is_due = states(
            view.decided, ours, block, row["open_at"], row["due_at"]
        )
        among = view.masked & is_open
        if self.params.by == "entropy":
            entropy = given(view.entropy, "entropy")
            score, sure = -entropy, entropy <= row["threshold"]
        else:
            score, sure = view.confidence, view.confidence > row["threshold"]
        push = self.params.push
        commit = pushed(among, among & sure, score, block, is_due, push)
        if not self.params.cut_at_end:
            return Decision(commit)
        end = torch.where(commit & view.is_eos, places, len(places)).amin(dim=1)
        return Decision(commit, truncate_at=torch.where(end < len(places), end, -1))
