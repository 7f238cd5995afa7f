# SPDX-License-Identifier: Apache-2.0
"""Levenshtein editing: fill masks, change tokens, delete them, insert before them.

A step writes masks i with c_i > mask_threshold; if these are not more than the masks
that edits have made, one more than those, the most confident ones; and all, once the
block's first masks are gone. Decided positions become the model's best token
where that is another one with c_i > edit_threshold. What is written DELETE goes, and a
mask comes to the block's end; before what is written INSERT, a mask comes, and the last
position falls out. A block ends with a step that leaves no mask and changes nothing, or
with the last of `max_post_steps` in a row that begin without a first mask, or with step
2 B + max_post_steps; these two fill all masks, with text alone. A step that would write
what an earlier one of the block wrote has its least confident change replaced.

Source: the loop of LLaDA2.2's checkpoints, as other projects describe it; SGLang.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field

from vllm_dlm.strategies.base import (
    AnyParams,
    Context,
    Decision,
    Params,
    StateField,
    Strategy,
    View,
    best_of,
    given,
    top_of,
)
from vllm_dlm.strategies.edits import edit_tokens, edited, factors, number
from vllm_dlm.strategies.post_steps import MOST_POST_STEPS, most_steps


class LevenshteinParams(Params):
    """Parameters of `Levenshtein`."""

    mask_threshold: float = Field(
        default=0.5,
        ge=0.0,
        le=2.0,
        description=(
            "Probability above which a masked position is written. Lower is faster, "
            "and leaves more to edits."
        ),
    )
    edit_threshold: float = Field(
        default=0.0,
        ge=0.0,
        le=2.0,
        description=(
            "Probability above which the model's best token replaces, deletes or comes "
            "before one that is written. At 0 it always does."
        ),
    )
    max_post_steps: int = Field(
        default=16,
        ge=1,
        le=MOST_POST_STEPS,
        description=(
            "Forwards in a row that a block may take after the last of the masks that "
            "it began with. It bounds edits that go back and forth."
        ),
    )


class Levenshtein(Strategy):
    """Fill, substitute, delete and insert."""

    name = "levenshtein"
    paper = "inclusionAI/LLaDA2.2"
    summary = "fills masks, and changes, deletes and inserts tokens"
    Params = LevenshteinParams
    logit_rows = "block"
    may_rewrite = True
    needs = frozenset({"other"})

    def __init__(self, params: AnyParams, block_length: int, context: Context) -> None:
        super().__init__(params, block_length, context)
        self.edit_tokens = edit_tokens(context)
        self.factors = factors(block_length).to(context.device)
        self.state = {
            # Whether a position, if it is masked, has been so since the block began.
            "original": StateField((block_length,), torch.bool, fill=1.0),
            "post_steps": StateField(dtype=torch.int64),
            # A number for what each step has written.
            "seen": StateField((most_steps(block_length),), torch.int64),
        }

    @classmethod
    def validate(cls, params: AnyParams, block_length: int, context: Context) -> None:
        edit_tokens(context)

    def step_limit(self, params: AnyParams) -> int:
        assert isinstance(params, LevenshteinParams)
        return most_steps(self.block_length, params.max_post_steps)

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        masked, other = view.masks, given(view.other, "other")
        first_masks = (masked & view.state["original"]).sum(dim=1)
        made_masks = masked.sum(dim=1) - first_masks
        post_steps = torch.where(first_masks == 0, view.state["post_steps"] + 1, 0)
        most = row_params["max_post_steps"]
        ends = (post_steps >= most) | (view.step + 1 >= 2 * self.block_length + most)

        sure = masked & (view.confidence > row_params["mask_threshold"][:, None])
        fewest = 1 + made_masks
        best = top_of(masked, view.confidence, fewest)
        write = torch.where((sure.sum(dim=1) >= fewest)[:, None], sure, best)
        write = torch.where(((first_masks == 0) | ends)[:, None], masked, write)
        better = view.confidence > row_params["edit_threshold"][:, None]
        write |= view.decided & better & (view.candidate != view.tokens)

        delete, insert = self.edit_tokens
        is_text = (view.candidate != delete) & (view.candidate != insert)
        text = torch.where(is_text, view.candidate, other)
        token = torch.where(ends[:, None], text, view.candidate)
        placed = torch.where(write, token, view.tokens)
        seen, key = view.state["seen"], number(view, placed, self.factors)
        repeats = (seen == key[:, None]).any(dim=1) & ~ends
        weakest = best_of(placed != view.tokens, -view.confidence)
        placed = torch.where(weakest & repeats[:, None], other, placed)
        key = number(view, placed, self.factors)

        after = edited(view, write, placed, self.edit_tokens)
        commit, remask = masked & ~after.masked, view.decided & after.masked
        edit = view.decided & ~after.masked & (after.tokens != view.tokens)
        changed = (commit | edit | remask).any(dim=1)
        return Decision(
            commit,
            # What is masked, the engine may have to fill.
            new_tokens=torch.where(after.masked, text, after.tokens),
            edit=edit,
            remask=remask,
            hold=~after.masked.any(dim=1) & changed & ~ends,
            # A step may do no more than delete.
            idle=torch.ones_like(ends),
            state={
                "original": after.original,
                "post_steps": post_steps,
                "seen": seen.scatter(1, view.step[:, None], key[:, None]),
            },
        )
