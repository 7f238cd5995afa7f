# SPDX-License-Identifier: Apache-2.0
"""Entropy decoding: write every masked token that the model hardly hesitates over.

commit = { i masked : H_i <= threshold } and the masked position with the least entropy,
where H_i is the entropy, in nats, of the model's distribution at i. Made for models
trained to be certain early. Source: dParallel, arXiv 2509.26488.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from vllm_dlm.strategies.base import (
    Decision,
    Params,
    Strategy,
    View,
    best_of,
    given,
)
from vllm_dlm.strategies.presets import Preset


class EntropyParams(Params):
    """Parameters of `Entropy`."""

    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset({"threshold": 0.5}, "czg1225/dParallel, LLaDA"),
        "llada_mbpp": Preset({"threshold": 0.45}, "czg1225/dParallel, LLaDA on MBPP"),
        "dream_math": Preset(
            {"threshold": 0.45}, "czg1225/dParallel, Dream on GSM8K and MATH"
        ),
    }

    threshold: float = Field(
        default=0.5,
        ge=0.0,
        le=100.0,
        description=(
            "Largest entropy, in nats, at which a token is written. Higher is faster "
            "and less exact; above the logarithm of the vocabulary's size (about 12), "
            "each step writes the whole block."
        ),
    )


class Entropy(Strategy):
    """Write the masked positions whose entropy is at most `threshold`."""

    name = "entropy"
    paper = "arXiv 2509.26488 (dParallel)"
    summary = "every token of at most this entropy, and the least uncertain one"
    Params = EntropyParams
    needs = frozenset({"entropy"})

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        entropy = given(view.entropy, "entropy")
        sure = entropy <= row_params["threshold"][:, None]
        best = best_of(view.masked, -entropy)
        return Decision((sure & view.masked) | best)
