# SPDX-License-Identifier: Apache-2.0
"""The oracle that Learn2PD's filter imitates: it knows the text that static decoding
wrote, and writes whatever the model gets right already.

A step writes every masked position whose best token is the known one. If the block's
best tokens are those of the step before, no later step would show anything new: all
that is left is written then, with the known tokens. So a block takes two or three
steps, and they are states that a parallel decoder visits. Positions behind the known
text take the model's best tokens, at the end. Only `vllm-dlm traces` decodes by it.
Source: arXiv 2509.25188.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field

from vllm_dlm.option_types import Count
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import (
    AnyParams,
    Context,
    Decision,
    Params,
    StateField,
    Strategy,
    View,
)


class OracleParams(Params):
    """Parameters of `Oracle`."""

    answer: tuple[Count, ...] = Field(
        min_length=1, description="Token ids that static decoding wrote."
    )


class Oracle(Strategy):
    """Write what the model gets right already."""

    name = "oracle"
    paper = "arXiv 2509.25188 (Learn2PD's training data)"
    summary = "knows the text, and writes what the model gets right already"
    Params = OracleParams
    logit_rows = "block"
    is_shared = False

    params: OracleParams

    def __init__(
        self, params: OracleParams, block_length: int, context: Context
    ) -> None:
        super().__init__(params, block_length, context)
        self.state = {"best": StateField((block_length,), torch.int64, fill=-1)}
        self.answer = torch.tensor(params.answer, device=context.device)

    def step_limit(self, params: AnyParams) -> int:
        """A token at least in each step, but for the one before the last."""
        return self.block_length + 2

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        length = len(self.answer)
        known = (view.positions >= 0) & (view.positions < length)
        text = self.answer[view.positions.clamp(0, length - 1)]
        right = known & (view.candidate == text)
        same = (view.candidate == view.state["best"]) | ~view.valid
        commit = view.masked & (right | same.all(dim=1, keepdim=True))
        return Decision(
            commit=commit,
            new_tokens=torch.where(known, text, view.candidate),
            idle=~commit.any(dim=1),
            state={"best": view.candidate},
        )


def register_oracle() -> str:
    """Let requests of this process name the oracle as their strategy; its name."""
    if Oracle.name not in STRATEGIES:
        STRATEGIES.register(Oracle.name, Oracle)
    return Oracle.name
