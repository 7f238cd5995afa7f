# SPDX-License-Identifier: Apache-2.0
"""Bounded adaptive confidence decoding: as sure as the block has been so far.

Written are the masked i with c_i >= tau, where c_i is the probability of the token at
i, or else the most confident one. In a block's first step tau is the largest masked
c_i; later it is the mean of all c that were written in this block. Either way it is
clamped to [lowest, highest]. Source: TDAR, arXiv 2602.09555, and LuLuLuyi/TDAR's code,
which keeps the mean by row of the batch, so that a request may inherit another's; here
it is the request's own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field, model_validator

from vllm_dlm.strategies.base import (
    Decision,
    Params,
    StateField,
    Strategy,
    View,
    best_masked,
)


class BacdParams(Params):
    """Parameters of `Bacd`."""

    lowest: float = Field(
        default=0.6,
        gt=0.0,
        le=2.0,
        description=(
            "Least value of the threshold, however unsure the block has been. Lower "
            "is faster and less exact."
        ),
    )
    highest: float = Field(
        default=0.9,
        gt=0.0,
        le=2.0,
        description=(
            "Largest value of the threshold, however sure the block has been. Equal "
            "to `lowest`, the threshold is fixed."
        ),
    )

    @model_validator(mode="after")
    def _bounds_in_order(self) -> BacdParams:
        if self.lowest > self.highest:
            raise ValueError(
                f"lowest is {self.lowest}, but highest is {self.highest}: no "
                "threshold lies between them; lower lowest or raise highest"
            )
        return self


class Bacd(Strategy):
    """Write what is as sure as the mean of what the block has written so far."""

    name = "bacd"
    paper = "arXiv 2602.09555 (TDAR)"
    summary = (
        "every token at least as probable as the block's written ones are on average"
    )
    Params = BacdParams
    # float64: a mean of equal numbers is that number, whatever their count.
    state = {"sum": StateField(dtype=torch.float64), "count": StateField()}

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        confidence = view.confidence.double()
        total, count = view.state["sum"], view.state["count"]
        best = torch.where(view.masked, confidence, 0.0).amax(dim=1)
        mean = torch.where(count > 0, total / count.clamp(min=1), best)
        threshold = mean.clamp(
            min=row_params["lowest"].double(), max=row_params["highest"].double()
        )
        sure = view.masked & (confidence >= threshold[:, None])
        commit = torch.where(sure.any(dim=1, keepdim=True), sure, best_masked(view))
        written = torch.where(commit, confidence, 0.0)
        return Decision(
            commit,
            state={
                "sum": total + written.sum(dim=1),
                "count": count + commit.sum(dim=1),
            },
        )
