# SPDX-License-Identifier: Apache-2.0
"""Credit decoding: a token that keeps being predicted counts as more probable.

Each masked position keeps a credit C_v for every token v that was its candidate in this
block. A step multiplies all credits by `decay` and adds c ** exponent to that of the
candidate, whose probability is c. The fused probability of v is

    p_v (1 + C_v) ** weight / (1 + sum_u p_u ((1 + C_u) ** weight - 1)),

the softmax of logits to which weight log(1 + C) is added. A position's token is the
one with the largest, and that is its confidence: written are those with confidence >=
threshold, and the best one.

Of texts that must match a pattern, a position's token is its candidate, and only how
sure it is comes from credit; probabilities are the posterior's.

Without parameters, exponent is 1, and weight and decay are the share of the block's
positions that are decided. Source: CreditDecoding, arXiv 2510.06133. It names 1 - mask
ratio for the latter; that the block's is meant, not the canvas's, is inferred.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field

from vllm_dlm.strategies import credit_accounts as accounts
from vllm_dlm.strategies.base import (
    Context,
    Decision,
    Params,
    Strategy,
    View,
    best_of,
    given,
)
from vllm_dlm.strategies.presets import Preset
from vllm_dlm.strategies.probabilities import fused


class CreditParams(Params):
    """Parameters of `Credit`."""

    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            {"weight": 0.7, "exponent": 0.2, "decay": 0.8},
            "inclusionAI/dInfer, defaults of CreditThresholdParallelDecoder",
        ),
        "dinfer": Preset(
            {"threshold": 0.8, "weight": 0.7, "exponent": 0.2, "decay": 0.8},
            "inclusionAI/dInfer, evaluations/eval_guide.md",
            "block_length 64, cache dual",
        ),
        "parameter_free": Preset(
            {"mode": "parameter_free"}, "arXiv 2510.06133, the variant of that name"
        ),
    }

    threshold: float = Field(
        default=0.9,
        gt=0.0,
        le=2.0,
        description=(
            "Least fused probability at which a token is written. Lower is faster and "
            "less exact; above 1 each step writes one token."
        ),
    )
    weight: float = Field(
        default=0.7,
        ge=0.0,
        le=5.0,
        description="How much credit raises a probability (alpha). At 0 not at all.",
    )
    exponent: float = Field(
        default=0.2,
        ge=0.0,
        le=10.0,
        description=(
            "Power of its probability that a candidate earns as credit (gamma). At 0 "
            "every candidate earns 1, however unsure; higher favours sure ones."
        ),
    )
    decay: float = Field(
        default=0.8,
        ge=0.0,
        le=1.0,
        description=(
            "Share of earlier credit that a step keeps (beta). At 1 none is ever "
            "lost; at 0 only the step's own counts."
        ),
    )
    mode: Literal["fixed", "parameter_free"] = Field(
        default="fixed",
        description=(
            "Whether weight, exponent and decay are as given, or exponent is 1 and the "
            "other two grow from 0 to 1 with the share of the block that is decided."
        ),
    )


class Credit(Strategy):
    """Write what is sure enough by fused probability, and the best one."""

    name = "credit"
    paper = "arXiv 2510.06133 (CreditDecoding)"
    summary = "a threshold on probabilities that grow for tokens predicted repeatedly"
    Params = CreditParams
    needs = frozenset({"probabilities"})
    own_tokens = True
    heeds_patterns = True

    params: CreditParams

    def __init__(
        self, params: CreditParams, block_length: int, context: Context
    ) -> None:
        super().__init__(params, block_length, context)
        self.state = accounts.state(block_length)

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        weight, exponent, decay = self._strength(view, row_params)
        earned = view.confidence ** exponent[:, None]
        tokens, credit = accounts.earn(view, earned, decay)
        measured = given(view.probabilities, "probabilities")
        probabilities = fused(measured, tokens, credit, weight[:, None, None])
        if self.context.has_pattern:
            # Candidates belong together: credit says how sure they are, not which.
            new_tokens = view.candidate
            confidence = accounts.of(new_tokens, probabilities, tokens, credit)
        else:
            best = probabilities.argmax(dim=-1, keepdim=True)
            confidence = probabilities.gather(2, best)[..., 0]
            new_tokens = tokens.gather(2, best)[..., 0]
        sure = view.masked & (confidence >= row_params["threshold"][:, None])
        commit = sure | best_of(view.masked, confidence)
        state = {"tokens": tokens.int(), "credit": credit}
        return Decision(commit, new_tokens, state=state)

    def _strength(
        self, view: View, row_params: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weight, exponent and decay of each row, each [R] float32."""
        if self.params.mode == "fixed":
            return row_params["weight"], row_params["exponent"], row_params["decay"]
        text = view.valid & (view.positions >= 0)
        decided = view.decided.sum(dim=1) / text.sum(dim=1).clamp(min=1)
        return decided, torch.ones_like(decided), decided
