# SPDX-License-Identifier: Apache-2.0
"""LocalLeap: near a very sure token, less certainty is enough.

Anchors are the masked i with c_i >= threshold, where c_i is the probability of the
token at i. Written are the anchors, every masked position at most `radius` away from
one with c_i >= relaxed_threshold, and the most confident masked position. Only masks
make anchors: tokens that earlier steps wrote do not. Source: LocalLeap, arXiv
2510.07081.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field

from vllm_dlm.strategies.base import Decision, Params, Strategy, View, best_masked


class LocalLeapParams(Params):
    """Parameters of `LocalLeap`."""

    threshold: float = Field(
        default=0.9,
        gt=0.0,
        le=2.0,
        description=(
            "Least probability of an anchor, a token that is written and relaxes the "
            "bound around it. Above 1 there are none: each step writes one token."
        ),
    )
    relaxed_threshold: float = Field(
        default=0.75,
        gt=0.0,
        le=2.0,
        description=(
            "Least probability of a token near an anchor. Lower is faster and less "
            "exact; from `threshold` on, anchors relax nothing."
        ),
    )
    radius: int = Field(
        default=4,
        ge=0,
        le=1_000_000,
        description=(
            "How many positions to either side an anchor reaches. 0 relaxes nothing; "
            "with the block length, one anchor relaxes the whole block."
        ),
    )


class LocalLeap(Strategy):
    """Write anchors, and what is sure enough in their neighbourhood."""

    name = "localleap"
    paper = "arXiv 2510.07081 (LocalLeap)"
    summary = "every token at least this probable; near one, less is enough"
    Params = LocalLeapParams

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        anchor = view.masked & (view.confidence >= row_params["threshold"][:, None])
        near = distance_to(anchor) <= row_params["radius"][:, None]
        sure = view.confidence >= row_params["relaxed_threshold"][:, None]
        commit = anchor | (near & sure & view.masked)
        return Decision(commit | best_masked(view))


def distance_to(marked: torch.Tensor) -> torch.Tensor:
    """Positions between each position and the nearest marked one of its row.

    Not a max-pool over the window: its width would have to be the same in all rows.

    Args:
        marked: [R, B] bool.

    Returns:
        [R, B] float32; infinity in a row without marks.
    """
    place = torch.arange(marked.shape[1], device=marked.device).float()
    left = torch.where(marked, place, -torch.inf).cummax(dim=1).values
    right = torch.where(marked, place, torch.inf).flip(1).cummin(dim=1).values.flip(1)
    return torch.minimum(place - left, right - place)
