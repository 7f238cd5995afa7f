# SPDX-License-Identifier: Apache-2.0
"""Saber: a bar that follows what was written, and tokens taken back.

The bar is the mean confidence at which positions of the canvas were written so far,
those taken back since included; 1 before any was. A step writes every masked i with
c_i above it, and at least the `fewest` most confident. Unless that was the last mask,
it then masks again those positions whose confidence has grown least since the last
step, new ones included: max(fewest / 2, F / 8) of them, the first rounded down and the
second up, for F written tokens, but at most F - 1, so every step gains a token. The
confidence of a decided position is that of the model's present best token for it,
which may be another than the one that stands there.

Source: Saber, arXiv 2510.18165, and zhaoyMa/Saber's code, over one block.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field

from vllm_dlm.strategies.base import (
    Context,
    Decision,
    Params,
    StateField,
    Strategy,
    View,
    top_masked,
    top_of,
)

NEVER = -1.0
"""`written_with` of a position that was never written."""


class SaberParams(Params):
    """Parameters of `Saber`."""

    fewest: int = Field(
        default=2,
        ge=1,
        le=1_000_000,
        description=(
            "Tokens that a step writes at least, sure or not (n). At least half as "
            "many are masked again, so up to 3 a step may gain a single token."
        ),
    )


class Saber(Strategy):
    """Write what is surer than what was written; take back what gained least."""

    name = "saber"
    paper = "arXiv 2510.18165 (Saber)"
    summary = "a threshold that adapts, and tokens masked again"
    Params = SaberParams
    logit_rows = "block"
    may_rewrite = True
    scope = "canvas"

    def __init__(self, params: SaberParams, block_length: int, context: Context):
        super().__init__(params, block_length, context)
        self.state = {
            # Confidence at which each position was last written.
            "written_with": StateField((block_length,), fill=NEVER),
            "last_confidence": StateField((block_length,)),
        }

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        fewest = row_params["fewest"]
        written_with = view.state["written_with"]
        bar = mean_written(written_with)[:, None]
        sure = view.masked & (view.confidence.double() > bar)
        # Where `fewest` or more are sure, the best `fewest` are among them.
        write = sure | top_masked(view, view.confidence, fewest)

        count = write.sum(dim=1)
        back = torch.maximum(fewest // 2, (count + 7) // 8)
        masks_left = (view.masks & ~write).any(dim=1)
        back = torch.where(masks_left, torch.minimum(back, count - 1), 0)
        growth = view.confidence - view.state["last_confidence"]
        standing = view.decided | write
        taken_back = top_of(standing, -growth, back)
        return Decision(
            write & ~taken_back,
            remask=taken_back & view.decided,
            state={
                "written_with": torch.where(write, view.confidence, written_with),
                "last_confidence": view.confidence,
            },
        )


def mean_written(written_with: torch.Tensor) -> torch.Tensor:
    """[R] float64: means of [R, B] without `NEVER`; 1 where that is all."""
    known = written_with != NEVER
    total = torch.where(known, written_with.double(), 0.0).sum(dim=1)
    count = known.sum(dim=1)
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)
