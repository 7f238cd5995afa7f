# SPDX-License-Identifier: Apache-2.0
"""Threshold decoding: write every masked token the model is sure enough of.

commit = { i masked : c_i >= threshold } and the most confident masked position, where
c_i is the probability of the token at i. Source: Fast-dLLM, arXiv 2505.22618.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field

from vllm_dlm.strategies.base import Decision, Params, Strategy, View, best_masked


class ThresholdParams(Params):
    """Parameters of `Threshold`."""

    threshold: float = Field(
        default=0.9,
        gt=0.0,
        le=2.0,
        description=(
            "Least probability at which a token is written. Lower is faster and less "
            "exact; above 1 no token reaches it, so each step writes one."
        ),
    )


class Threshold(Strategy):
    """Write the masked positions whose confidence reaches `threshold`."""

    name = "threshold"
    paper = "arXiv 2505.22618 (Fast-dLLM)"
    summary = "every token at least this probable, and the best one"
    Params = ThresholdParams

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        sure = view.confidence >= row_params["threshold"][:, None]
        return Decision((sure & view.masked) | best_masked(view))
