# SPDX-License-Identifier: Apache-2.0
"""Options of searches that write step by step."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from vllm_dlm.search.base import Driver, Kind, Step

STOP = ("\n\n",)
TOKENS = 256
"""A step of an autoregressive model where the options do not say."""


class Stepwise(Driver):
    """A driver whose texts grow by steps."""

    temperature: float = Field(default=1.0, ge=0, description="Of the draws.")
    max_tokens: int = Field(default=256, ge=1, description="Most tokens of a text.")
    step_stop: tuple[str, ...] | None = Field(
        default=None,
        description="Of an autoregressive model: texts that end a step. Default: a "
        "blank line.",
    )
    step_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Of an autoregressive model: most tokens of a step. Default: 256.",
    )
    step_blocks: int | None = Field(
        default=None, ge=1, description="Of a diffusion model: blocks of a step; 1."
    )

    @model_validator(mode="after")
    def _stops_are_texts(self) -> Self:
        if self.step_stop is not None and not all(self.step_stop):
            raise ValueError("step_stop: an empty text would end every step at once")
        return self

    def check(self, kind: Kind, has_scorer: bool) -> None:
        """See `Driver`."""
        if kind == "autoregressive" and self.step_blocks is not None:
            raise ValueError(
                "step_blocks is for diffusion models, and this one writes token by "
                "token: set step_stop or step_tokens"
            )
        if kind != "autoregressive" and (self.step_stop or self.step_tokens):
            raise ValueError(
                "step_stop and step_tokens are for autoregressive models, and this one "
                "writes whole blocks: set step_blocks"
            )

    def step(self, kind: Kind) -> Step:
        """A step of this model."""
        if kind != "autoregressive":
            return Step(blocks=self.step_blocks or 1)
        if self.step_stop is None and self.step_tokens is not None:
            return Step(tokens=self.step_tokens)
        stop = STOP if self.step_stop is None else self.step_stop
        return Step(stop=stop, tokens=self.step_tokens or TOKENS)
