# SPDX-License-Identifier: Apache-2.0
"""A strategy of one's own: write every token that leads by enough."""

from collections.abc import Mapping

import torch
from pydantic import Field

from vllm_dlm.strategies.base import Decision, Params, Strategy, View, best_masked


class LeadParams(Params):
    least: float = Field(
        default=0.5, ge=0.0, le=1.0, description="Least lead over the runner-up."
    )


class Lead(Strategy):
    name = "lead"
    paper = "none"
    summary = "every token that leads by enough, and the best one"
    Params = LeadParams
    needs = frozenset({"margin"})

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        # Requests differ in `least`: one number per row, [R] against [R, B].
        sure = view.margin >= row_params["least"][:, None]
        return Decision((sure & view.masked) | best_masked(view))
