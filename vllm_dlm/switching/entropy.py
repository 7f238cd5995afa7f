# SPDX-License-Identifier: Apache-2.0
"""When the other model takes over: the rule of arXiv 2502.06833, without vLLM.

A turn is what one model writes before the other goes on. Each of its tokens has an
entropy H, of the distribution that the model gives it before temperature. The mean of
the last `window` entropies decides: the small model hands over at mean >= tau, the
large one at mean <= tau, and neither before it has written `min_tokens` tokens.

The paper does not say who writes the token whose entropy decided; here it is the next
model, which sees it first. It gives no tau: it depends on the two models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_dlm.messages import explain, unknown
from vllm_dlm.option_types import Count, Number

Model = Literal["small", "large"]
SMALL: Model = "small"
LARGE: Model = "large"

PREFIX = "ead_"
"""Begins the rule's names in a request: `ead_tau`, `ead_window`, `ead_min_tokens`."""


MAX_WINDOW = 1024
"""Most entropies in a mean: an engine keeps as many of each turn."""


class SwitchRule(BaseModel):
    """When the models take turns."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    tau: Number = Field(
        ge=0,
        description="entropy at which they change; 0: the large model writes all but "
        "the first tokens, inf: the small one writes everything",
    )
    window: Count = Field(5, ge=1, le=MAX_WINDOW, description="entropies in the mean")
    min_tokens: Count = Field(10, ge=1, description="fewest tokens of a turn")
    unit: Literal["bits", "nats"] = Field("bits", description="of tau")

    @model_validator(mode="after")
    def _turn_fills_window(self) -> SwitchRule:
        if self.min_tokens < self.window:
            raise ValueError(
                f"min_tokens ({self.min_tokens}) must be at least window "
                f"({self.window}): a mean is of one model's entropies"
            )
        return self

    @property
    def tau_bits(self) -> float:
        """`tau` in bits."""
        return self.tau if self.unit == "bits" else self.tau / math.log(2)


def make_rule(**options: Any) -> SwitchRule:
    """A checked rule.

    Raises:
        ValueError: an option that is not known, or not valid; it says what is.
    """
    for name in options:
        if name not in SwitchRule.model_fields:
            raise ValueError(unknown(name, SwitchRule.model_fields))
    try:
        return SwitchRule(**options)
    except ValidationError as error:
        raise ValueError(explain(error)) from None


def rule_of_request(rule: SwitchRule, extra_args: Mapping[str, Any]) -> SwitchRule:
    """`rule`, with what a request says about it.

    Args:
        rule: the router's, or the server's.
        extra_args: the request's; keys that begin with `PREFIX` are the rule's.

    Raises:
        ValueError: a key or a value that is not valid.
    """
    own = {key: value for key, value in extra_args.items() if key.startswith(PREFIX)}
    if not own:
        return rule
    valid = [PREFIX + name for name in SwitchRule.model_fields]
    for key in own:
        if key not in valid:
            raise ValueError(unknown(key, valid))
    changed = {key.removeprefix(PREFIX): value for key, value in own.items()}
    try:
        return SwitchRule(**{**rule.model_dump(), **changed})
    except ValidationError as error:
        raise ValueError(f"{PREFIX}*: {explain(error)}") from None


def entropy_bits(logits: torch.Tensor) -> torch.Tensor:
    """Shannon entropy of each row, in bits.

    Args:
        logits: [N, V]; -inf is a token that cannot be drawn.

    Returns:
        [N] float32.
    """
    probabilities = logits.softmax(dim=-1, dtype=torch.float32)
    return torch.special.entr(probabilities).sum(dim=-1) / math.log(2)


class Turn:
    """What the rule knows of one model's turn."""

    def __init__(self, rule: SwitchRule, model: Model) -> None:
        self._rule = rule
        self._model = model
        self._entropies: list[float] = []

    def ends(self, written: int, entropy: float) -> bool:
        """Whether the other model writes the next token.

        Asking again about a token replaces the earlier answer: an engine computes a
        position twice, as when the rest of a prompt comes in a later forward.

        Args:
            written: tokens of this turn so far.
            entropy: of the next token, in bits.
        """
        del self._entropies[written:]
        self._entropies.append(entropy)
        if written < self._rule.min_tokens:
            return False
        window = self._entropies[-self._rule.window :]
        mean = math.fsum(window) / len(window)
        if self._model == SMALL:
            return mean >= self._rule.tau_bits
        return mean <= self._rule.tau_bits
