# SPDX-License-Identifier: Apache-2.0
"""Iteration smoothing: masks that stay masked remember what the step thought of them.

In step k of a block, masks with c_i >= min(threshold_k, best - 1e-5) are written, where
best is the largest c of the step's masks: the most confident one always is. The bound
falls to the threshold, and what a mask remembers grows:

    threshold_k = max(1 - threshold_decay k, threshold)
    weight_k    = min(weight_start + weight_growth k, weight_max)

A position that is still masked is fed the mask's embedding and, added to it, weight_k
times the mean embedding of all tokens, by their probabilities in this step (of the
model's own distribution, the mask id among them). A written token is fed as it is.

Source: dInfer, arXiv 2510.08666, for LLaDA and LLaDA-MoE. There k counts the steps of
the whole text; here those of a block, which a preempted request repeats. From k = 10 on
both are the same with the published numbers: texts of one block are decoded alike.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field

from vllm_dlm.strategies.base import (
    AnyParams,
    Decision,
    Params,
    Soft,
    SoftInputs,
    Strategy,
    View,
)

NEARLY_BEST = 1e-5
"""What is this close to the best confidence is as good."""


class SmoothParams(Params):
    """Parameters of `Smooth`."""

    threshold: float = Field(
        default=0.8,
        gt=0.0,
        le=2.0,
        description="Probability at which a token is written, once it has come down.",
    )
    threshold_decay: float = Field(
        default=0.02,
        ge=0.0,
        le=1.0,
        description=(
            "How much that probability falls with each step of a block, from 1 on. "
            "With 1 it is `threshold` from the second step on."
        ),
    )
    weight_start: float = Field(
        default=0.15,
        ge=0.0,
        le=1.0,
        description=(
            "Weight of what a mask remembers after a block's first step. With 0 and no "
            "growth the rule writes what it would without a memory."
        ),
    )
    weight_growth: float = Field(
        default=0.02,
        ge=0.0,
        le=1.0,
        description="How much that weight grows with each step.",
    )
    weight_max: float = Field(
        default=0.3,
        ge=0.0,
        le=1.0,
        description="The largest weight.",
    )


class Smooth(Strategy):
    """Write what is sure enough; feed masks what the model thinks of them."""

    name = "smooth"
    paper = "arXiv 2510.08666 (dInfer)"
    summary = "masks carry the model's mean prediction into the next step"
    Params = SmoothParams

    @classmethod
    def soft(cls, params: AnyParams) -> SoftInputs:
        return SoftInputs("full", "add")

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        # In float64, rounded at the end: compiled, a product and a sum may be one.
        step = view.step.double()
        number = {name: value.double() for name, value in row_params.items()}
        falling = 1.0 - number["threshold_decay"] * step
        threshold = torch.maximum(falling, number["threshold"]).float()
        grown = number["weight_start"] + number["weight_growth"] * step
        weight = torch.minimum(grown, number["weight_max"]).float()
        confidence = torch.where(view.masked, view.confidence, -torch.inf)
        best = confidence.amax(dim=1) - NEARLY_BEST
        bound = torch.minimum(threshold, best)[:, None]
        commit = view.masked & (view.confidence >= bound)
        where = view.masked & ~commit
        weights = weight[:, None].expand_as(view.confidence)[..., None]
        return Decision(commit, soft=Soft(where, weights.contiguous()))
