# SPDX-License-Identifier: Apache-2.0
"""Threshold decoding: write every masked token the model is sure enough of.

commit = { i masked : c_i >= threshold } and the most confident masked position, where
c_i is the probability of the token at i. Source: Fast-dLLM, arXiv 2505.22618. Later
models compare with >: `strict`. LLaDA2.0 (arXiv 2512.15745) and SDAR (arXiv 2510.06303)
write at least as many as the step schedule has: `at_least`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from vllm_dlm.strategies.base import (
    Decision,
    Params,
    Strategy,
    View,
    best_masked,
    top_masked,
)
from vllm_dlm.strategies.presets import Preset


class ThresholdParams(Params):
    """Parameters of `Threshold`."""

    presets: ClassVar[Mapping[str, Preset]] = {
        f"wino_plus_{task}": Preset(
            {"threshold": threshold},
            f"Feng-Hong/WINO-DLLM, WINO+ weights on {problems}",
            "block_length 128, max_tokens 256",
        )
        for task, threshold, problems in (
            ("gsm8k", 0.65, "GSM8K"),
            ("math", 0.8, "MATH-500"),
            ("code", 0.9, "HumanEval and MBPP"),
            ("puzzle", 0.6, "Countdown and Sudoku"),
            ("choice", 0.5, "ARC"),
        )
    }

    threshold: float = Field(
        default=0.9,
        gt=0.0,
        le=2.0,
        description=(
            "Least probability at which a token is written. Lower is faster and less "
            "exact; above 1 no token reaches it, so each step writes one."
        ),
    )
    strict: bool = Field(
        default=False,
        description=(
            "A token's probability must be above `threshold`, not merely reach it: the "
            "form of LLaDA2, SDAR and Fast-dLLM v2."
        ),
    )
    at_least: Literal["best", "scheduled"] = Field(
        default="best",
        description=(
            "What a step writes if too few tokens are sure enough: the most confident "
            "one, or as many of the most confident as the step schedule has (LLaDA2.0 "
            "and SDAR)."
        ),
    )


class Threshold(Strategy):
    """Write the masked positions whose confidence reaches `threshold`."""

    name = "threshold"
    paper = "arXiv 2505.22618 (Fast-dLLM)"
    summary = "every token at least this probable, and the best one"
    Params = ThresholdParams
    schedule: ClassVar[Mapping[str, Any]] = {"at_least": "scheduled"}

    params: ThresholdParams

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        threshold = row_params["threshold"][:, None]
        if self.params.strict:
            sure = view.confidence > threshold
        else:
            sure = view.confidence >= threshold
        # Of sure tokens and the best k, the one set holds the other: where fewer than
        # k are sure, the union is the best k.
        if self.params.at_least == "scheduled":
            best = top_masked(view, view.confidence, view.scheduled)
        else:
            best = best_masked(view)
        return Decision((sure & view.masked) | best)
