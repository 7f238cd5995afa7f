# SPDX-License-Identifier: Apache-2.0
"""Joint thresholds: fill masks early, and change tokens that look wrong later.

In each step of a block, masked i with c_i > mask_threshold are written, or the most
confident one if none is. The same step gives decided positions (not the prompt's) the
model's present best token, where that is another one with c_i > edit_threshold. Once no
mask is left, the block stays open as long as steps change something: at most
max_post_steps more forwards, which only edit. Without `edit` it is the rule
`threshold` with `strict`.

Of texts that must match a pattern, an edit is to the best token that leaves the rest of
the text as it is; `penalty` then makes tokens less sure and changes none.

With `penalty`, the logit of the token to the left, where there is one in the block, is
lowered by that much at each position before all this: it keeps a model from stuttering.

Source: LLaDA2.1, arXiv 2602.08676. The report prints no thresholds; the presets are its
model cards'. Rule, penalty and end of a block follow SGLang's JointThreshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from vllm_dlm.option_types import Number
from vllm_dlm.strategies.base import (
    AnyParams,
    Context,
    Decision,
    Params,
    StateField,
    Strategy,
    View,
    best_masked,
)
from vllm_dlm.strategies.post_steps import MOST_POST_STEPS, most_steps
from vllm_dlm.strategies.presets import Preset
from vllm_dlm.strategies.stutter import penalised


class JointParams(Params):
    """Parameters of `Joint`."""

    presets: ClassVar[Mapping[str, Preset]] = {
        name: Preset(
            {"mask_threshold": mask, "edit_threshold": edit},
            f"the model cards of LLaDA2.1: {name} mode",
            "block_length 32",
        )
        for name, mask, edit in (("quality", 0.7, 0.5), ("speed", 0.5, 0.0))
    }

    mask_threshold: float = Field(
        default=0.7,
        ge=0.0,
        le=2.0,
        description=(
            "Probability above which a masked position is written. Lower is faster, "
            "and leaves more to edits."
        ),
    )
    edit_threshold: float = Field(
        default=0.5,
        ge=0.0,
        le=2.0,
        description=(
            "Probability above which another token replaces one that is written. At 0 "
            "the model's best token always does; `edit` switches edits off."
        ),
    )
    edit: bool = Field(
        default=True,
        description=(
            "Whether tokens that are written may change. Switch it off for models "
            "that were not trained to correct themselves."
        ),
    )
    penalty: Number | None = Field(
        default=None,
        gt=0.0,
        le=100.0,
        description=(
            "How much the logit of a token is lowered right of the same token "
            "(SGLang's penalty_lambda, which suggests 3 against stutter)."
        ),
    )
    max_post_steps: int = Field(
        default=16,
        ge=0,
        le=MOST_POST_STEPS,
        description="Forwards of a block for edits alone, after its last mask.",
    )


class Joint(Strategy):
    """Write masks above one probability, edit tokens above another."""

    name = "joint"
    paper = "arXiv 2602.08676 (LLaDA2.1)"
    summary = "fills masks early and corrects tokens that are written"
    Params = JointParams
    needs = frozenset({"probabilities"})
    logit_rows = "block"
    heeds_patterns = True

    params: JointParams

    def __init__(
        self, params: JointParams, block_length: int, context: Context
    ) -> None:
        super().__init__(params, block_length, context)
        self.may_rewrite = params.edit
        self.needs = self.needs_with(params)
        # Steps so far that began without a mask.
        self.state = (
            {"post_steps": StateField(dtype=torch.int64)} if params.edit else {}
        )

    @classmethod
    def needs_with(cls, params: AnyParams) -> frozenset[str]:
        assert isinstance(params, JointParams)
        return frozenset({"probabilities"} if params.penalty else ())

    def step_limit(self, params: AnyParams) -> int:
        assert isinstance(params, JointParams)
        steps = most_steps(self.block_length, params.max_post_steps)
        return steps if params.edit else self.block_length

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        if self.params.penalty:
            view = penalised(view, self.params.penalty, self.context)
        sure = view.confidence > row_params["mask_threshold"][:, None]
        # Where any is sure, the best one is.
        commit = (sure & view.masked) | best_masked(view)
        if not self.params.edit:
            return Decision(commit, new_tokens=view.candidate)
        better = view.confidence > row_params["edit_threshold"][:, None]
        edit = view.decided & better & (view.candidate != view.tokens)
        is_full = ~(view.masks & ~commit).any(dim=1)
        post_steps = view.state["post_steps"] + (~view.masks.any(dim=1)).long()
        changed = (commit | edit).any(dim=1)
        hold = is_full & changed & (post_steps < row_params["max_post_steps"])
        state = {"post_steps": post_steps}
        return Decision(commit, view.candidate, edit=edit, hold=hold, state=state)
