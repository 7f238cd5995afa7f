# SPDX-License-Identifier: Apache-2.0
"""Factor decoding: the more tokens a step writes, the surer each of them must be.

With the masked confidences sorted, c_(1) >= c_(2) >= ..., the n best are written for
the largest n such that (j + 1) (1 - c_(j)) < factor for all 2 <= j <= n. The bound is
that of Fast-dLLM's theorem on when parallel and sequential greedy decoding agree. Its
published loop also writes the last candidate when that one alone fails; this follows
the definition. Source: Fast-dLLM, arXiv 2505.22618.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field

from vllm_dlm.strategies.base import Decision, Params, Strategy, View, top_masked


class FactorParams(Params):
    """Parameters of `Factor`."""

    factor: float = Field(
        default=1.0,
        gt=0.0,
        le=1e6,
        description=(
            "Bound on (tokens written + 1) x (1 - probability of the least sure one). "
            "Higher is faster and less exact; above the block length + 1, each step "
            "writes the whole block."
        ),
    )


class Factor(Strategy):
    """Write as many of the most confident positions as the bound allows."""

    name = "factor"
    paper = "arXiv 2505.22618 (Fast-dLLM)"
    summary = "as many tokens as their joint certainty allows"
    Params = FactorParams

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        # Decided positions sort last and fail the test: 1 - (-inf) is above any bound.
        ranked = torch.where(view.masked, view.confidence, -torch.inf)
        ranked = ranked.sort(dim=1, descending=True).values
        rank = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
        passes = (rank + 1) * (1 - ranked) < row_params["factor"][:, None]
        passes |= rank == 1
        count = passes.cumprod(dim=1).sum(dim=1)
        return Decision(top_masked(view, view.confidence, count))
