# SPDX-License-Identifier: Apache-2.0
"""Replay of a step map: write each position in the step that a recording names.

`recorded_steps[i]` is the denoise step, counted over the request, that wrote output
token i, -1 for none. A block's steps begin after those of all tokens left of it: with
b = 1 + the largest of these (0 where there are none), its step s writes the masked
positions whose recorded step is b + s, or was before. A step without any is idle, as
it was in the recording. Positions without a step follow when the rest of the block is
written, the most confident one in each step. Where the tokens are the engine's own
candidates, the same request gives the same text again, also when they are drawn.
`recorded_tokens` names the tokens as well: then what is written is theirs, whatever
the model would have written, and log-probabilities are those of a given text.
No paper: the counterpart of the option `step_map`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field, field_validator

from vllm_dlm.strategies.base import (
    AnyParams,
    Context,
    Decision,
    Params,
    Strategy,
    View,
    best_of,
)
from vllm_dlm.strategies.recordings import Step, Token, check_length, check_recording


class ReplayParams(Params):
    """Parameters of `Replay`."""

    recorded_steps: tuple[Step, ...] = Field(
        fail_fast=True,
        description=(
            "Denoise step of every output token, from 0 over the whole request: "
            "`steps` of a step map and `beyond`, joined. Tokens without a step (-1, or "
            "beyond the list) are written at the end of their block, one in a step."
        ),
    )
    recorded_tokens: tuple[Token, ...] | None = Field(
        default=None,
        fail_fast=True,
        description=(
            "Token id of every output token, to be written in place of what the model "
            "predicts; beyond the list the model's own are written."
        ),
    )

    @field_validator("recorded_steps", "recorded_tokens")
    @classmethod
    def _check_length(cls, entries: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return check_length(entries)


class Replay(Strategy):
    """Write every position in its recorded step."""

    name = "replay"
    paper = "none: replays the option step_map"
    summary = "each token in the step that a step map names"
    Params = ReplayParams
    is_shared = False
    own_tokens = True

    params: ReplayParams

    def __init__(
        self, params: ReplayParams, block_length: int, context: Context
    ) -> None:
        super().__init__(params, block_length, context)
        self.recorded = torch.tensor(params.recorded_steps, device=context.device)
        before_all = self.recorded.new_full((1,), -1)
        largest = torch.cat([before_all, self.recorded]).cummax(dim=0).values
        self.first_steps = largest + 1
        """[N + 1] int64: the step at which a block begins that starts at a position."""
        self.tokens: torch.Tensor | None = None
        """[N] int64: tokens to write; None for the model's own."""
        if params.recorded_tokens is not None:
            self.tokens = torch.tensor(params.recorded_tokens, device=context.device)

    @classmethod
    def validate(cls, params: AnyParams, block_length: int, context: Context) -> None:
        """Refuse steps that no recording has, and tokens that are none."""
        assert isinstance(params, ReplayParams)
        check_recording(
            params.recorded_steps, params.recorded_tokens, block_length, context
        )

    def step_limit(self, params: AnyParams) -> int:
        """As many steps as the recording took, and those for what it lacks."""
        assert isinstance(params, ReplayParams)
        return max(params.recorded_steps) + 1 + self.block_length

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        length = len(self.recorded)
        first = self.first_steps[view.positions[:, 0].clamp(0, length)]
        now = first + view.step
        # A position beyond the map waits for ever; its own rule is below.
        index = view.positions.clamp(0, length - 1)
        known = (view.positions < length) & (self.recorded[index] >= 0)
        due = view.masked & known & (self.recorded[index] <= now[:, None])
        waiting = (view.masked & known).any(dim=1)
        rest = best_of(view.masked & ~known, view.confidence)
        return Decision(
            commit=due | (rest & ~waiting[:, None]),
            new_tokens=self._tokens_at(view),
            idle=waiting & ~due.any(dim=1),
        )

    def _tokens_at(self, view: View) -> torch.Tensor | None:
        """[R, B] int64: what is written; None for the candidates."""
        if self.tokens is None:
            return None
        last = len(self.tokens) - 1
        named = (view.positions >= 0) & (view.positions <= last)
        recorded = self.tokens[view.positions.clamp(0, last)]
        return torch.where(named, recorded, view.candidate)

    @classmethod
    def why_unconstrained(cls, params: AnyParams) -> str | None:
        """Without tokens of its own it writes candidates, which match."""
        assert isinstance(params, ReplayParams)
        if params.recorded_tokens is None:
            return None
        return super().why_unconstrained(params)
