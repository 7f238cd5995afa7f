# SPDX-License-Identifier: Apache-2.0
"""EOS early rejection (EOSER): tokens that end the text lose weight in early steps.

Decoded as one block, a long canvas tends to fill with end-of-text tokens first. The
score of masked i is c_i, and c_i g(t) where its token ends the text, with g(t) =
first_weight + (last_weight - first_weight) t; the best by score are written. `even`
writes as many as the step schedule says, at t = s / (S - 1) in step s of S, or t = 1
where S is 1. `doubling` writes as `ass` does, at t = (2^(s + 1) - 1) / 2^S.

Source: arXiv 2509.23924, and yjyddq/EOSER-ASS-RL's code with one block. That damps the
tokenizer's one EOS token; this, all that end the request's text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from vllm_dlm.strategies.ass import (
    doubling_count,
    doubling_length,
    doubling_steps,
    masks_at_first,
)
from vllm_dlm.strategies.base import (
    AnyParams,
    Context,
    Decision,
    Params,
    StateField,
    Strategy,
    View,
    top_masked,
)

FIRST_WEIGHTS = {"even": 0.4, "doubling": 0.01}
"""Default of `first_weight` by schedule."""


class EoserParams(Params):
    """Parameters of `Eoser`."""

    schedule: Literal["even", "doubling"] = Field(
        default="even",
        description=(
            "How many tokens a step writes: those of the option `steps`, or twice as "
            "many as the step before, as `ass` does."
        ),
    )
    first_weight: float = Field(
        default=FIRST_WEIGHTS["even"],
        ge=0.0,
        le=1.0,
        description=(
            "Factor on the confidence of tokens that end the text at the beginning "
            "(gamma_min). Lower keeps them away for longer; 1 changes nothing. With "
            "the schedule doubling it is .01 unless given."
        ),
    )
    last_weight: float = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="The same factor at the end (gamma_max).",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_first_weight(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("schedule") != "doubling":
            return given
        return {"first_weight": FIRST_WEIGHTS["doubling"], **given}


class Eoser(Strategy):
    """Write the most confident tokens; those that end the text count less early."""

    name = "eoser"
    paper = "arXiv 2509.23924 (EOSER and ASS)"
    summary = "holds tokens that end the text back in early steps"
    Params = EoserParams
    scope = "canvas"
    schedule: ClassVar[Mapping[str, Any]] = {"schedule": "even"}
    counts_out = True

    params: EoserParams

    def __init__(
        self, params: EoserParams, block_length: int, context: Context
    ) -> None:
        super().__init__(params, block_length, context)
        if params.schedule == "doubling":
            self.state = {"masks": StateField(dtype=torch.int64)}

    def reference_steps(self, params: AnyParams, steps: int) -> int | None:
        if self.params.schedule == "doubling":
            return doubling_length(self.block_length)
        return super().reference_steps(params, steps)

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        state = {}
        if self.params.schedule == "doubling":
            masks = state["masks"] = masks_at_first(view)
            count = doubling_count(view.step, masks)
            steps = doubling_steps(masks).double()
            time = (2.0 ** (view.step + 1).double() - 1) / 2.0**steps
        else:
            count = view.scheduled
            last = view.steps - 1
            # A block of one step begins at its end.
            time = torch.where(last > 0, view.step / last.clamp(min=1).double(), 1.0)
        first = row_params["first_weight"].double()
        growth = row_params["last_weight"].double() - first
        weight = first + growth * time.clamp(max=1.0)
        confidence = view.confidence.double()
        score = torch.where(view.is_eos, confidence * weight[:, None], confidence)
        return Decision(top_masked(view, score, count), state=state)
