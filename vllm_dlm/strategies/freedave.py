# SPDX-License-Identifier: Apache-2.0
"""FreeDave: draft several steps ahead, verify them in one forward, lose nothing.

Each decision writes what sequential decoding (one token a step, the most confident)
would write, and drafts the masks left in the order of their confidence. The next
forward evaluates `drafts` canvases: the canvas itself (branch 0) and branch j, which
has the first j drafts written. From branch 0 on: if what sequential decoding does on a
branch is to write the very next draft, that draft is right, and the branch that has it
is the canvas sequential decoding would be at. The chain goes on there. Where it breaks,
the branch's own choice is written. So every forward writes one token at least, and the
text is that of sequential decoding.

With `eager`, the masks of the blocks to come are drafted behind those of the active
block, and the chain goes on where that block is full: what a full block's keys and
values are does not depend on what is to its right, so that this loses nothing either.

With `threshold` (freedave++) a step of the procedure that is followed writes every
token that is sure, as the strategy `threshold` does; here a branch is taken over only
if its drafts are exactly what such a step writes, so that this is lossless too.

Source: FreeDave, arXiv 2510.00294, and cychomatica/FreeDave's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from vllm_dlm.strategies.base import (
    AnyParams,
    Branches,
    Context,
    Decision,
    Params,
    Strategy,
    View,
    best_of,
    given,
)
from vllm_dlm.strategies.chains import decided
from vllm_dlm.strategies.presets import Preset


class FreeDaveParams(Params):
    """Parameters of `FreeDave`."""

    presets: ClassVar[Mapping[str, Preset]] = {
        name: Preset(
            {"drafts": drafts, "threshold": threshold, "eager": block_length == 4},
            f"cychomatica/FreeDave, eval/scripts/eval_{name.split('_')[0]}.sh",
            f"block_length {block_length}",
        )
        for name, drafts, threshold, block_length in (
            ("llada", 4, 2.0, 32),
            ("llada_plus", 4, 0.95, 32),
            ("dream", 8, 2.0, 32),
            ("dream_plus", 8, 0.95, 32),
            ("trado", 8, 2.0, 4),
            ("trado_plus", 8, 0.9, 4),
        )
    }

    drafts: int = Field(
        default=4,
        ge=1,
        le=16,
        description=(
            "Canvases that one forward evaluates, which is the most tokens it can "
            "write one by one. More saves forwards and makes each of them dearer; 1 "
            "drafts nothing."
        ),
    )
    threshold: float = Field(
        default=2.0,
        gt=0.0,
        le=2.0,
        description=(
            "Least probability at which a token is written along with others. Above "
            "1 the text is that of one token per step, otherwise that of the strategy "
            "threshold (freedave++)."
        ),
    )
    eager: bool = Field(
        default=False,
        description=(
            "Draft the masks of the blocks to come too, and go on in these within the "
            "same forward. For models with block attention."
        ),
    )


class FreeDave(Strategy):
    """Write the drafts that sequential decoding would have written, and one step."""

    name = "freedave"
    paper = "arXiv 2510.00294 (FreeDave)"
    summary = "one token per step, several steps per forward: drafted, then verified"
    Params = FreeDaveParams
    needs = frozenset({"branches"})
    heeds_patterns = True

    @classmethod
    def branches(cls, params: AnyParams) -> int:
        assert isinstance(params, FreeDaveParams)
        return params.drafts

    @classmethod
    def looks_ahead(cls, params: AnyParams) -> int:
        assert isinstance(params, FreeDaveParams)
        return params.drafts if params.eager else 0

    @classmethod
    def validate(cls, params: AnyParams, block_length: int, context: Context) -> None:
        exact = ("none", "prefix", "dual") if context.attention == "full" else ("none",)
        if context.cache not in exact:
            raise ValueError(
                f"the strategy 'freedave' does several steps in one forward, and with "
                f"cache {context.cache!r} the keys of a step depend on how many "
                f"forwards were before it: set cache to {' or '.join(map(repr, exact))}"
                ", or use 'threshold'"
            )

    def reference_steps(self, params: AnyParams, steps: int) -> int | None:
        """Those of one token per step, which `static` counts out as well."""
        assert isinstance(params, FreeDaveParams)
        return self.block_length if params.threshold > 1 else None

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        branches = given(view.branches, "branches")
        return decided(branches, _step(branches, row_params["threshold"]))


def _step(branches: Branches, threshold: torch.Tensor) -> torch.Tensor:
    """[R, K, B] bool: what a step of the followed procedure writes on each branch."""
    masked = branches.masked
    sure = masked & (branches.confidence >= threshold[:, None, None])
    best = best_of(masked, branches.confidence)
    return torch.where(sure.any(dim=2, keepdim=True), sure, best)
