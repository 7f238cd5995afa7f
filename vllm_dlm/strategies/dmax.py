# SPDX-License-Identifier: Apache-2.0
"""DMax: write a run of masks from the left, and let all written tokens change.

In each step of a block, with x_i the candidate, c_i its probability, y_i the most
probable token and q_i its probability:

1. of the masks, all left of the first one with c_i < threshold are written, the
   leftmost in any case. A run, not a set: what is sure behind a doubt waits;
2. every position that the block has written before gets the model's present best token,
   whatever its probability;
3. the block ends as soon as all of its positions have q_i >= sure, the ones that were
   masked too, or the step has changed nothing; at the latest after B steps. While masks
   are left (which takes a temperature above 0) it goes on;
4. else every written position is fed a mixture in the next step:
   q_i E[y_i] + (1 - q_i) E[mask], as long as q_i |E[y_i]| + (1 - q_i) |E[mask]|.

The model must be trained to be fed such mixtures: DMax's own checkpoints are fine-tuned
from LLaDA2 for it. `soft: false` leaves the fourth part out, and feeds tokens.

Source: arXiv 2604.08302 and czg1225/DMax. There a batch ends a block together; here
each request does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

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
    best_of,
    given,
)
from vllm_dlm.strategies.presets import Preset


class DMaxParams(Params):
    """Parameters of `DMax`."""

    presets: ClassVar[Mapping[str, Preset]] = {
        "math": Preset({"threshold": 0.5}, "czg1225/DMax: GSM8K and MATH-500"),
        "code": Preset({"threshold": 0.65}, "czg1225/DMax: HumanEval and MBPP"),
    }

    threshold: float = Field(
        default=0.5,
        ge=0.0,
        le=2.0,
        description=(
            "Probability below which a mask ends the run that a step writes. Lower is "
            "faster, and leaves more to corrections. At most `sure`."
        ),
    )
    sure: float = Field(
        default=0.9,
        gt=0.0,
        le=2.0,
        description=(
            "A block ends when all of its tokens are this probable. Above 1 it ends "
            "when a step changes nothing."
        ),
    )
    soft: bool = Field(
        default=True,
        description=(
            "Whether written positions are fed mixtures of token and mask, which the "
            "server must be able to make (`--dlm-soft-inputs`)."
        ),
    )


class DMax(Strategy):
    """Write masks from the left, and correct all that is written."""

    name = "dmax"
    paper = "arXiv 2604.08302 (DMax)"
    summary = "writes runs of masks, revises every token, and feeds how sure it is"
    Params = DMaxParams
    needs = frozenset({"best"})
    logit_rows = "block"
    may_rewrite = True
    heeds_patterns = True

    params: DMaxParams

    def __init__(self, params: DMaxParams, block_length: int, context: Context) -> None:
        super().__init__(params, block_length, context)
        # Masks that the block began with: what a client has written stays out of it.
        self.state = {"active": StateField((block_length,), torch.bool)}

    @classmethod
    def soft(cls, params: AnyParams) -> SoftInputs | None:
        assert isinstance(params, DMaxParams)
        if not params.soft:
            return None
        return SoftInputs("top", "replace", 2, keeps_norm=True)

    @classmethod
    def validate(cls, params: AnyParams, block_length: int, context: Context) -> None:
        assert isinstance(params, DMaxParams)
        if params.threshold > params.sure:
            raise ValueError(
                f"dmax: threshold {params.threshold} is above `sure`, {params.sure}: a "
                "block could end with masks in it; set threshold to at most that"
            )

    def step_limit(self, params: AnyParams) -> int:
        # It ends a block itself; what the engine lets a very last step do is no edit.
        return self.block_length + 1

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        is_first = (view.step == 0)[:, None]
        active = torch.where(is_first, view.masks, view.state["active"])
        best, sure = given(view.best, "best"), given(view.best_confidence, "best")
        if self.context.has_pattern:
            # Candidates are parts of one text, which best tokens are not.
            best, sure = view.candidate, view.confidence
        doubt = view.masked & (view.confidence < row_params["threshold"][:, None])
        run = view.masked & (doubt.long().cumsum(dim=1) == 0)
        places = torch.arange(view.masked.shape[1], device=run.device)
        commit = run | best_of(view.masked, -places.expand_as(run).float())
        edit = view.decided & active & (best != view.tokens)
        tokens = torch.where(view.masked, view.candidate, best)

        is_full = ~(view.masks & ~commit).any(dim=1)
        all_sure = (sure >= row_params["sure"][:, None]) | ~active
        is_over = all_sure.all(dim=1) | ~(commit | edit).any(dim=1)
        is_over = is_over | (view.step + 1 >= self.block_length)
        written = active & (view.decided | commit)
        mask = torch.full_like(best, self.context.mask_id or 0)
        mixture = torch.stack([sure, 1.0 - sure], -1), torch.stack([best, mask], -1)
        return Decision(
            commit,
            tokens,
            edit=edit,
            hold=is_full & ~is_over,
            state={"active": active},
            soft=Soft(written, *mixture) if self.params.soft else None,
        )
