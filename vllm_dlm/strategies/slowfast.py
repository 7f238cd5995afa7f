# SPDX-License-Identifier: Apache-2.0
"""SlowFast sampling: find out how far the model sees, then fill up to there.

A block is decoded in cycles, from left to right. A cycle's slow phase looks at all
masks: its horizon is one past the furthest masked i with c_i >= horizon_threshold, or
one past the cycle's start if there is none. Once two horizons in a row differ by at
most 1, the cycle ends at the latter; after `slow_steps` steps, at the mean of the last
two. The fast phase fills the masks left of that end, and the next cycle starts there.
Every step writes the masks it looks at with c_i >= threshold, and the best of them.

Source: SlowFast sampling, arXiv 2506.10848. What the slow phase writes, and its end
after `slow_steps`, are as in the code (LiangrunFlora/Slow-Fast-Sampling). There it
always takes as many steps; here, as in the paper, it ends once the horizon is stable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from vllm_dlm.strategies.base import (
    Decision,
    Params,
    StateField,
    Strategy,
    View,
    best_of,
)
from vllm_dlm.strategies.presets import Preset


class SlowFastParams(Params):
    """Parameters of `SlowFast`."""

    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            {"threshold": 0.85, "horizon_threshold": 0.1, "slow_steps": 8},
            "arXiv 2506.10848",
        ),
        "code": Preset(
            {"threshold": 0.9, "horizon_threshold": 0.3, "slow_steps": 6},
            "LiangrunFlora/Slow-Fast-Sampling, defaults of its LLaDA sampler",
            "block_length canvas",
        ),
    }

    threshold: float = Field(
        default=0.85,
        gt=0.0,
        le=2.0,
        description=(
            "Least probability of a token that is written along with the most "
            "probable one. Lower is faster and less exact."
        ),
    )
    horizon_threshold: float = Field(
        default=0.1,
        ge=0.0,
        le=2.0,
        description=(
            "Least probability of the furthest token that a cycle reaches for. Higher "
            "makes cycles shorter."
        ),
    )
    slow_steps: int = Field(
        default=8,
        ge=1,
        le=1_000_000,
        description=(
            "Steps after which a cycle's slow phase ends, whether or not the horizon "
            "is stable."
        ),
    )


class SlowFast(Strategy):
    """Decode a block in cycles: look how far tokens are foreseeable, then fill."""

    name = "slowfast"
    paper = "arXiv 2506.10848 (SlowFast sampling)"
    summary = "a threshold within spans that end where the model stops foreseeing"
    Params = SlowFastParams
    # Offsets in the block. `end` and `horizon` are 0 where the cycle has none yet.
    state = {
        "start": StateField(dtype=torch.int64),
        "end": StateField(dtype=torch.int64),
        "horizon": StateField(dtype=torch.int64),
        "slow_steps": StateField(dtype=torch.int64),
    }

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        start, end = view.state["start"], view.state["end"]
        last_horizon, spent = view.state["horizon"], view.state["slow_steps"]
        place = torch.arange(view.masked.shape[1], device=view.masked.device)

        # A cycle is over when its span is full, which the slow phase may have done.
        left = (view.masked & (place < end[:, None])).any(dim=1)
        over = (end > 0) & ~left
        start = torch.where(over, end, start)
        end = end.masked_fill(over, 0)
        last_horizon = last_horizon.masked_fill(over, 0)
        spent = spent.masked_fill(over, 0)

        slow = end == 0
        span = view.masked & (slow[:, None] | (place < end[:, None]))
        sure = span & (view.confidence >= row_params["threshold"][:, None])
        commit = sure | best_of(span, view.confidence)

        seen = view.masked & (
            view.confidence >= row_params["horizon_threshold"][:, None]
        )
        furthest = torch.where(seen, place + 1, 0).amax(dim=1)
        horizon = torch.where(furthest > 0, furthest, start + 1)
        spent = spent + slow
        first = last_horizon == 0
        stable = ~first & ((horizon - last_horizon).abs() <= 1)
        mean = torch.where(first, horizon, (horizon + last_horizon) // 2)
        out_of_steps = spent >= row_params["slow_steps"]
        found = torch.where(stable, horizon, mean.masked_fill(~out_of_steps, 0))
        return Decision(
            commit,
            state={
                "start": start,
                "end": torch.where(slow, found, end),
                "horizon": horizon,
                "slow_steps": spent,
            },
        )
