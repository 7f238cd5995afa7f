# SPDX-License-Identifier: Apache-2.0
"""Confidence-adaptive decoding: count the sure tokens, within limits.

n = #{ i masked : c_i >= threshold }, and the best min(max(n, fewest), most) masked
positions are written. By entropy, sure is H_i <= entropy_threshold and best the least
entropy. Until `release_end` of the longest output is written, positions whose token
ends the text are passed over; where nothing else is left, the engine writes the most
confident one. Source: CD4LM, arXiv 2601.02236, and yihao-liang/CDLM's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from vllm_dlm.strategies.base import (
    Context,
    Decision,
    Params,
    Strategy,
    View,
    given,
    top_masked,
)
from vllm_dlm.strategies.presets import Preset


class CadParams(Params):
    """Parameters of `Cad`."""

    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            {"threshold": 0.95, "fewest": 1, "most": 32, "release_end": 0.3},
            "yihao-liang/CDLM, evaluation/scripts",
            "block_length 32, for HumanEval and MBPP 256",
        ),
        "code": Preset(
            {"threshold": 0.8, "fewest": 1, "most": 4, "release_end": 0.5},
            "yihao-liang/CDLM, defaults of scripts/LLaDA_generate_dynamic.py",
            "block_length 32",
        ),
    }

    threshold: float = Field(
        default=0.95,
        gt=0.0,
        le=2.0,
        description=(
            "Least probability at which a token counts as sure. Lower is faster and "
            "less exact; above 1 each step writes `fewest`."
        ),
    )
    fewest: int = Field(
        default=1,
        ge=1,
        le=1_000_000,
        description="Tokens that a step writes at least, sure or not (n_min).",
    )
    most: int = Field(
        default=32,
        ge=1,
        le=1_000_000,
        description=(
            "Tokens that a step writes at most, however many are sure (n_max). From "
            "the block length on it limits nothing."
        ),
    )
    mode: Literal["confidence", "entropy"] = Field(
        default="confidence",
        description=(
            "What makes a token sure: its probability, by `threshold`, or the entropy "
            "at its position, by `entropy_threshold`."
        ),
    )
    entropy_threshold: float = Field(
        default=0.3,
        ge=0.0,
        le=100.0,
        description=(
            "Largest entropy, in nats, at which a token counts as sure. Higher is "
            "faster and less exact. Read in the mode entropy only."
        ),
    )
    release_end: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description=(
            "Share of `max_tokens` that must be written before a token may be that "
            "ends the text (rho). Higher keeps an answer from ending too early, and "
            "makes short ones of a large max_tokens longer; 0 holds nothing back."
        ),
    )

    @model_validator(mode="after")
    def _limits_in_order(self) -> CadParams:
        if self.fewest > self.most:
            raise ValueError(
                f"fewest is {self.fewest}, but most is {self.most}: a step cannot "
                "write both; lower fewest or raise most"
            )
        return self


class Cad(Strategy):
    """Write as many of the best positions as are sure, from `fewest` to `most`."""

    name = "cad"
    paper = "arXiv 2601.02236 (CD4LM)"
    summary = "as many tokens as are sure, within a least and a most"
    Params = CadParams
    needs = frozenset({"entropy"})

    params: CadParams

    def __init__(self, params: CadParams, block_length: int, context: Context) -> None:
        super().__init__(params, block_length, context)
        self.needs = frozenset({"entropy"} if params.mode == "entropy" else ())

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        too_early = view.progress < row_params["release_end"]
        held_back = view.is_eos & too_early[:, None]
        view = replace(view, masked=view.masked & ~held_back)
        if self.params.mode == "entropy":
            score = -given(view.entropy, "entropy")
            least = -row_params["entropy_threshold"]
        else:
            score = view.confidence
            least = row_params["threshold"]
        sure = ((score >= least[:, None]) & view.masked).sum(dim=1)
        count = sure.clamp(min=row_params["fewest"], max=row_params["most"])
        return Decision(top_masked(view, score, count))
