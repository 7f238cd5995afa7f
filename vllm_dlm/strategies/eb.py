# SPDX-License-Identifier: Apache-2.0
"""Entropy-bounded decoding: as many tokens as can depend on each other but little.

With the masked entropies sorted, H_(1) <= H_(2) <= ..., the n least uncertain are
written for the largest n such that H_(1) + ... + H_(n) minus the largest of them is at
most `bound`. Tokens that are written together are chosen as if independent; this
difference is the most, in nats, that they can say about each other.
Source: EB-Sampler, arXiv 2505.24857, as NEUIR/PC-Sampler's code has it.
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
    given,
)
from vllm_dlm.strategies.presets import Preset


class EntropyBoundedParams(Params):
    """Parameters of `EntropyBounded`."""

    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            {"bound": 0.01},
            "NEUIR/PC-Sampler, scripts/eval_eb_sampler.sh",
            "block_length canvas",
        ),
        "code": Preset(
            {"bound": 0.1},
            "NEUIR/PC-Sampler, default of src/generate.py",
            "block_length canvas",
        ),
    }

    bound: float = Field(
        default=0.1,
        ge=0.0,
        le=1e6,
        description=(
            "Most, in nats, that the tokens of a step may say about each other: the "
            "sum of their entropies without the largest. Higher is faster and less "
            "exact; at 0 a step writes one token, and those that are certain."
        ),
    )


class EntropyBounded(Strategy):
    """Write as many of the least uncertain positions as the bound allows."""

    name = "eb"
    paper = "arXiv 2505.24857 (EB-Sampler)"
    summary = "as many tokens as a bound on their joint entropy allows"
    Params = EntropyBoundedParams
    needs = frozenset({"entropy"})

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        entropy = given(view.entropy, "entropy").double()
        return Decision(bounded(view.masked, entropy, row_params["bound"]))


def bounded(
    among: torch.Tensor, entropy: torch.Tensor, bound: torch.Tensor
) -> torch.Tensor:
    """[R, B] bool: positions whose smaller entropies are at most `bound` [R] together.

    The least uncertain one always is; of equal entropies, the left one comes first.
    Sums are made in the type of `entropy`.
    """
    ranked = torch.where(among, entropy, torch.inf).sort(dim=1, stable=True)
    # Sorted, the largest of the n least is the nth.
    smaller = ranked.values.cumsum(dim=1) - ranked.values
    within = torch.zeros_like(among)
    return within.scatter(1, ranked.indices, smaller <= bound[:, None]) & among
