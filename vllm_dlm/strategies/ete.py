# SPDX-License-Identifier: Apache-2.0
"""Explore-then-exploit, reconstructed: sure tokens, and an unsure one beside them.

Windows of `window` positions divide the output; the active one is the first with a
mask. Masked i of it and of the `ahead` windows behind it with c_i >= threshold are
written. A token of probability c tells log2(1 / c) bits: where these tell fewer than
`fewest_bits` bits, or are fewer than `fewest_tokens`, the step also writes the masked
position of the active window with the largest entropy among the others, because
knowing that one changes most. Where nothing at all qualifies, the most confident
position of the active window is written.

**A reconstruction.** Of arXiv 2511.21103 only the abstract was read: no code is public,
and its parameters are not known. The abstract has the bound on rounds, the use of sure
tokens across blocks, and the exploration of unsure ones; the rule above, its defaults
and its measure of uncertainty are this package's. Results are not the paper's. No
branches are tried: each step is one forward.
"""

from __future__ import annotations

from collections.abc import Mapping

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


class EteParams(Params):
    """Parameters of `Ete`."""

    threshold: float = Field(
        default=0.9,
        gt=0.0,
        le=2.0,
        description=(
            "Least probability at which a token is written without further thought. "
            "Lower is faster and less exact."
        ),
    )
    window: int = Field(
        default=32,
        ge=1,
        le=1_000_000,
        description=(
            "Positions of a window. The output is written window by window, apart "
            "from tokens that are sure ahead of it."
        ),
    )
    ahead: int = Field(
        default=1,
        ge=1,
        le=4,
        description="Windows behind the active one in which sure tokens are written.",
    )
    fewest_bits: float = Field(
        default=1.0,
        ge=0.0,
        le=1_000_000.0,
        description=(
            "Information below which a step also writes an unsure token. Higher is "
            "faster and riskier; 0 asks for none."
        ),
    )
    fewest_tokens: int = Field(
        default=2,
        ge=0,
        le=1_000_000,
        description=(
            "Sure tokens below which a step also writes an unsure one. With this and "
            "`fewest_bits` at 0 no step does."
        ),
    )


class Ete(Strategy):
    """Write sure tokens of some windows; explore where they tell little."""

    name = "ete"
    paper = "arXiv 2511.21103 (Explore-Then-Exploit; reconstructed from the abstract)"
    summary = "sure tokens, and an unsure one where they say little (reconstruction)"
    Params = EteParams
    needs = frozenset({"entropy"})
    scope = "canvas"

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        window = view.positions // row_params["window"][:, None]
        first = torch.where(view.masked, window, window.amax()).amin(
            dim=1, keepdim=True
        )
        active = view.masked & (window == first)
        reached = view.masked & (window <= first + row_params["ahead"][:, None])

        exploit = reached & (view.confidence >= row_params["threshold"][:, None])
        bits = torch.where(exploit, -view.confidence.double().log2(), 0.0).sum(dim=1)
        little = bits < row_params["fewest_bits"].double()
        few = exploit.sum(dim=1) < row_params["fewest_tokens"]
        others = active & ~exploit
        most_open = best_of(others, given(view.entropy, "entropy"))
        commit = exploit | (most_open & (little | few)[:, None])
        best = best_of(active, view.confidence)
        return Decision(commit | (best & ~commit.any(dim=1, keepdim=True)))
