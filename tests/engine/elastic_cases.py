# SPDX-License-Identifier: Apache-2.0
"""Requests with an elastic hole, in terms of the engine and of the oracle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from engine.cases import MASK_ID, make_prompt
from engine.harness import params
from reference.dreamon import Choose, Filled, at_least, infill, least_entropy
from reference.llada import TinyLLaDA
from reference.network import TinyModel
from vllm import SamplingParams

EXPAND, EOS = 5, 121
"""With seed 2 the model writes both in a hole, now and then."""


@dataclass(frozen=True)
class Infill:
    """A request, in terms of engine and oracle."""

    prompt: tuple[int, ...]
    suffix: tuple[int, ...]
    most: int
    initial: int | None = None
    threshold: float | None = None
    """Of the strategy `threshold`; else the published choice."""
    widen: float = 0.0
    """Added to the logits of the token that widens."""
    end: float = 0.0
    """Added to those of the end of the text."""
    source: str = "suffix"

    def params(self, **more: Any) -> SamplingParams:
        dlm: dict[str, Any] = {"holes": "elastic"}
        if self.initial is not None:
            dlm["initial_hole"] = self.initial
        if self.threshold is not None:
            dlm["strategy"] = "threshold"
            dlm["strategy_config"] = {"threshold": self.threshold}
        if self.source == "suffix":
            dlm["suffix"] = list(self.suffix)
        else:
            dlm["canvas"] = [3, 4, *[MASK_ID] * self.most, *self.suffix]
        bias = {EXPAND: self.widen, EOS: self.end}
        width = self.most + (2 + len(self.suffix)) * (self.source != "suffix")
        return params(width, dlm=dlm, logit_bias=bias, **more)

    def expected(
        self, oracle: TinyLLaDA | TinyModel, shift: int = 0, **more: Any
    ) -> Filled:
        choose: Choose = least_entropy()
        if self.threshold is not None:
            choose = at_least(self.threshold)
        written = () if self.source == "suffix" else (3, 4)
        filled = infill(
            Biased(oracle, {EXPAND: self.widen, EOS: self.end}),
            [*self.prompt, *written],
            self.suffix,
            mask_id=oracle.mask_id,
            expand_id=EXPAND,
            closing={EOS},
            most=self.most,
            initial=4 if self.initial is None else self.initial,
            shift=shift,
            choose=choose,
            **more,
        )
        is_long = len(filled.tokens) == self.most
        if self.source != "suffix":
            filled.tokens = [*written, *filled.tokens, *self.suffix]
        if not is_long:
            filled.tokens.append(EOS)  # as every text that ends before it is full
        return filled


@dataclass
class Biased:
    """A network with the request's `logit_bias`."""

    oracle: TinyLLaDA | TinyModel
    bias: dict[int, float]

    def forward(self, ids: list[int]) -> torch.Tensor:
        logits = self.oracle.forward(ids).clone()
        for token, value in self.bias.items():
            logits[:, token] += value
        return logits


EVENTFUL = (
    # Prompt's number, most, initial, threshold, widen, end.
    (2, 12, 6, 0.3, 5.0, 2.0),
    (35, 19, 6, None, 5.0, 2.0),
    (21, 12, None, 0.1, 5.0, 3.0),
    (6, 33, None, 0.3, 5.0, 4.0),
    (16, 7, 6, 0.1, 5.0, 0.0),
    (2, 9, None, 0.1, 5.0, 4.0),
    (9, 9, None, None, 6.0, 1.0),
    (13, 17, 1, None, 6.0, 0.0),
    (1, 9, 1, None, 0.0, 0.0),
    (8, 3, 9, None, 0.0, 2.0),
)
"""Of LLaDA: all that can happen in a hole does."""

EVENTFUL_SHIFTED = (
    (14, 33, 6, None, 5.0, 3.0),
    (26, 7, 6, 0.2, 5.0, 4.0),
    (31, 7, 6, None, 5.0, 4.0),
    (31, 33, None, 0.3, 5.0, 4.0),
    (24, 12, 6, None, 5.0, 2.0),
)
"""Of Dream."""


def make_cases(table: Sequence[tuple[Any, ...]] = EVENTFUL) -> list[Infill]:
    return [
        Infill(
            make_prompt(3 + number, number),
            make_prompt(1 + number % 5, 50 + number),
            *more,
        )
        for number, *more in table
    ] + [
        Infill(make_prompt(3 + n, n), (9, 8), *more, source="canvas")
        for n, *more in table[2:4]
    ]


def assert_eventful(wanted: Sequence[Filled]) -> None:
    seen = sum((one.seen for one in wanted), Counter())
    assert min(seen[kind] for kind in ("text", "goes", "widens")) >= 15
    assert seen["barred"] >= 5 and seen["again"] >= 1
