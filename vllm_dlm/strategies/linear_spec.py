# SPDX-License-Identifier: Apache-2.0
"""LinearSpec: the model drafts a block both ways, and reads it causally to verify it.

Two forwards a round. The first one sees the text and, behind its last token, masks that
see each other, and drafts a token for each of them. The second one sees the drafts in
their places, causally: each row predicts the token to its right, as an autoregressive
model would. From the left on, drafts that are what is predicted are right; where one is
not, the predicted token is written, and the round is over. So each round writes one
token at least and B at most, and the text is the one that the model writes one by one.

A drawn token (temperature > 0) is drawn in the second forward, from the numbers of its
position; the first one drafts with the same numbers.

Where the text must match a pattern, candidates are chosen from the left on, each the
best that leaves a text: as an autoregressive model is held to a pattern.

Source: Nemotron-Labs-Diffusion, arXiv 2607.05722: `linear_spec_generate` of the
released code, without the adapter that it can draft with.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_dlm.strategies.base import (
    NOT_DRAFTED,
    AnyParams,
    Decision,
    Params,
    Strategy,
    View,
    given,
)


class LinearSpecParams(Params):
    """`LinearSpec` has none: with fewer drafts the text would be the same."""


class LinearSpec(Strategy):
    """Draft a block, then write what a causal reading of the drafts confirms."""

    name = "linear_spec"
    paper = "arXiv 2607.05722 (Nemotron-Labs-Diffusion)"
    summary = "the model's autoregressive text, drafted by blocks, two forwards each"
    Params = LinearSpecParams
    needs = frozenset({"branches"})
    verifies = True
    heeds_patterns = True

    def step_limit(self, params: AnyParams) -> int:
        """Of a token: it is drafted, then written."""
        return 3

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        drafts = given(view.branches, "branches")
        is_draft = view.masked & (drafts.rank != NOT_DRAFTED)
        is_right = is_draft & (drafts.tokens == view.candidate)
        # Up to the first one that is not, which is corrected.
        wrong = (view.masked & ~is_right).long()
        confirmed = view.masked & (wrong.cumsum(dim=1) - wrong == 0)
        # A prompt's last row has no drafts behind it: one token is written.
        verifies = view.step > 0
        return Decision(
            commit=confirmed & verifies[:, None],
            idle=~verifies,
            draft_tokens=view.candidate,
            draft_rank=torch.where(view.masked & ~verifies[:, None], 0, NOT_DRAFTED),
        )
