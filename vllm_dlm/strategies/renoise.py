# SPDX-License-Identifier: Apache-2.0
"""Renoise: DiffusionGemma's sampler, for models that denoise random tokens.

A canvas begins with tokens drawn uniformly from the whole vocabulary, and no position
is ever decided before the canvas is. Step s of at most N divides the logits by

    T = t_min + (t_max - t_min) * (N - s) / N

and takes of softmax(logits / T) its entropy H_i, its best token and a drawn one. With
the entropies sorted, position i is accepted if all smaller ones together are at most
`entropy_bound`; the surest always is. Accepted positions hold the drawn token in the
next step, all others a fresh random one, and all are fed what this step expects of them
too: the mean of the embeddings under softmax(logits / T).

The canvas ends, and its text is the best tokens, as soon as these are the same as in
each of the last `stability` steps and the mean of H is below `confidence`; or with step
N. So every position may change in every step, and what was accepted may be lost again.

Under a pattern all of it is the posterior's: the best tokens are the most probable text
that matches, the drawn ones another, and the engine feeds the posterior's mean.
Source: transformers, `models/diffusion_gemma`; it accepts as the EB-Sampler does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from pydantic import Field, model_validator

from vllm_dlm.strategies.base import (
    AnyParams,
    Context,
    Decision,
    Params,
    Soft,
    SoftInputs,
    StateField,
    Strategy,
    View,
    given,
)
from vllm_dlm.strategies.eb import bounded


class RenoiseParams(Params):
    """Parameters of `Renoise`; the defaults are the released model's."""

    entropy_bound: float = Field(
        default=0.1,
        gt=0.0,
        le=1e6,
        description=(
            "Most, in nats, that the entropies below an accepted position's own may be "
            "together. Higher accepts more positions in a step."
        ),
    )
    t_min: float = Field(
        default=0.4, gt=0.0, le=100.0, description="The schedule's lowest temperature."
    )
    t_max: float = Field(
        default=0.8, gt=0.0, le=100.0, description="The first step's temperature."
    )
    max_denoising_steps: int = Field(
        default=48, ge=1, le=1024, description="Most denoise steps of a canvas."
    )
    stability: int = Field(
        default=1,
        ge=0,
        le=1024,
        description="Steps in which the best tokens must have stayed the same, to end.",
    )
    confidence: float = Field(
        default=0.005,
        gt=0.0,
        le=100.0,
        description="Mean entropy in nats below which a canvas ends: higher is faster.",
    )

    @model_validator(mode="after")
    def _fall(self) -> Self:
        if self.t_min > self.t_max:
            raise ValueError(
                f"t_min {self.t_min} is above t_max {self.t_max}: the temperature falls"
            )
        return self


class Renoise(Strategy):
    """Accept the surest positions and draw the others anew, until the text stands."""

    name = "renoise"
    paper = "transformers, models/diffusion_gemma"
    summary = (
        "random tokens are denoised, and others drawn, until the text stands still"
    )
    Params = RenoiseParams
    needs = frozenset({"entropy", "best", "noise"})
    measures = "drawn"
    noise = "uniform"
    writes = "best"

    def __init__(
        self, params: RenoiseParams, block_length: int, context: Context
    ) -> None:
        super().__init__(params, block_length, context)
        # The last step's best tokens, since when, and for how many steps all the same.
        self.state = {
            "last": StateField((block_length,), torch.int64, fill=-1),
            "since": StateField((block_length,), torch.int64),
            "same_for": StateField((), torch.int64),
        }

    @classmethod
    def soft(cls, params: AnyParams) -> SoftInputs:
        return SoftInputs("full", "condition")

    def step_limit(self, params: AnyParams) -> int:
        assert isinstance(params, RenoiseParams)
        return params.max_denoising_steps

    def temperature(
        self, step: torch.Tensor, row_params: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        lowest, steps = row_params["t_min"], row_params["max_denoising_steps"]
        left = (steps - step).clamp(min=1) / steps
        return lowest + (row_params["t_max"] - lowest) * left

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        entropy, best = given(view.entropy, "entropy"), given(view.best, "best")
        accept = bounded(view.masked, entropy, row_params["entropy_bound"])
        same = best == view.state["last"]
        all_same = (same | ~view.masked).all(dim=1)
        same_for = torch.where(all_same, view.state["same_for"] + 1, 0)
        since = torch.where(same, view.state["since"], view.step[:, None])
        count = view.masked.sum(dim=1).clamp(min=1)
        mean = torch.where(view.masked, entropy, 0.0).sum(dim=1) / count
        stop = (same_for >= row_params["stability"]) & (mean < row_params["confidence"])
        stop |= view.step + 1 >= row_params["max_denoising_steps"]
        return Decision(
            commit=view.masked & stop[:, None],
            new_tokens=best,
            idle=~stop,
            held=torch.where(accept, view.candidate, given(view.noise, "noise")),
            soft=Soft(view.masked, torch.ones_like(entropy)[..., None]),
            settled=since,
            state={"last": best, "since": since, "same_for": same_for},
        )
