# SPDX-License-Identifier: Apache-2.0
"""LLaDA's static schedule: a fixed number of tokens per step, the best by a score.

A block of B masked tokens decoded in S steps writes B // S tokens a step and one more
in each of the first B mod S steps; the engine counts that out as `View.scheduled`.
Source: LLaDA, arXiv 2502.09992.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field

from vllm_dlm.strategies.base import (
    Context,
    Decision,
    Params,
    Strategy,
    View,
    given,
    top_masked,
)

_NEEDS = {"random": "uniform", "margin": "margin", "entropy": "entropy"}


class StaticParams(Params):
    """Parameters of `Static`; the number of steps is the request's, not the rule's."""

    mode: Literal["low_confidence", "random", "margin", "entropy", "left_to_right"] = (
        Field(
            default="low_confidence",
            description=(
                "What is written first: the most confident tokens (low_confidence: "
                "the least confident stay masked), random ones, those with the largest "
                "lead over the runner-up (margin), those with the least entropy, or "
                "the leftmost."
            ),
        )
    )


class Static(Strategy):
    """Write the `scheduled` best masked positions of each step."""

    name = "static"
    paper = "arXiv 2502.09992 (LLaDA)"
    summary = "a fixed number of tokens per step, the most confident first"
    Params = StaticParams
    needs = frozenset(_NEEDS.values())
    schedule = True
    counts_out = True

    params: StaticParams

    def __init__(
        self, params: StaticParams, block_length: int, context: Context
    ) -> None:
        super().__init__(params, block_length, context)
        self.needs = frozenset({_NEEDS[params.mode]} if params.mode in _NEEDS else ())

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        return Decision(top_masked(view, self._score(view), view.scheduled))

    def _score(self, view: View) -> torch.Tensor:
        mode = self.params.mode
        if mode == "left_to_right":
            places = torch.arange(view.masked.shape[1], device=view.masked.device)
            return -places.expand_as(view.masked)
        if mode == "low_confidence":
            return view.confidence
        score = given(getattr(view, _NEEDS[mode]), _NEEDS[mode])
        return -score if mode == "entropy" else score
