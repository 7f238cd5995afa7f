# SPDX-License-Identifier: Apache-2.0
"""KLASS: write tokens that are sure and whose distribution has come to rest.

Written are the masked i with c_i > threshold, c_i the probability of the token at i, at
which each of the block's last `history` steps moved the distribution p by less than
kl_threshold: KL(p_now || p_before), in nats. Where there is none, as many of the most
confident are written as the step schedule has. A block's first step has nothing to
compare with, so this is the rule of its first `history` steps. In sub-blocks it is so
of each: only positions that may be written are looked at.

Of p_before only the 64 most probable tokens are remembered, and the divergence is taken
over these and one rest: it is never more than the true one, and the same if the
vocabulary has no more tokens. Where 64 tokens hold nearly all probability, as they do
where a token is sure, the difference is small.

Source: KLASS, arXiv 2511.05664, and shkim0116/KLASS's code, where the first step of a
block is compared with the last step of the one before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from vllm_dlm.strategies.base import (
    Context,
    Decision,
    Params,
    StateField,
    Strategy,
    View,
    given,
    top_masked,
)
from vllm_dlm.strategies.presets import Preset
from vllm_dlm.strategies.probabilities import divergence

REMEMBERED = 64
"""Tokens of each position whose probabilities are kept for the next step."""

_PUBLISHED = (
    ("paper", 0.9, 0.01, "defaults of src/llada_evaluation.py"),
    ("llada_gsm8k", 0.6, 0.015, "scripts/llada_gsm8k.sh"),
    ("llada_math", 0.6, 0.01, "scripts/llada_math.sh"),
    ("llada_humaneval", 0.9, 0.01, "scripts/llada_humaneval.sh"),
    ("llada_mbpp", 0.7, 0.01, "scripts/llada_mbpp.sh"),
    ("dream_gsm8k", 0.9, 0.001, "scripts/dream_gsm8k.sh"),
    ("dream_math", 0.9, 0.005, "scripts/dream_math.sh"),
    ("dream_humaneval", 0.8, 0.001, "scripts/dream_humaneval.sh"),
    ("dream_mbpp", 0.9, 0.001, "scripts/dream_mbpp.sh"),
)
"""Preset, threshold, kl_threshold, and the file that has them."""


class KlassParams(Params):
    """Parameters of `Klass`."""

    presets: ClassVar[Mapping[str, Preset]] = {
        name: Preset(
            {"threshold": threshold, "kl_threshold": kl_threshold, "history": 2},
            f"shkim0116/KLASS, {file}",
            f"block_length {'canvas' if name.startswith('dream') else 64}",
        )
        for name, threshold, kl_threshold, file in _PUBLISHED
    }

    threshold: float = Field(
        default=0.9,
        gt=0.0,
        le=2.0,
        description=(
            "Probability that a token must exceed to be written ahead of schedule. "
            "Lower is faster and less exact."
        ),
    )
    kl_threshold: float = Field(
        default=0.01,
        ge=0.0,
        le=100.0,
        description=(
            "How far a step may move the distribution at a position that counts as "
            "stable: the KL divergence, in nats, must be below. Higher is faster."
        ),
    )
    history: int = Field(
        default=2,
        ge=1,
        le=8,
        description=(
            "Steps in a row in which a position must have been stable. Higher is "
            "slower."
        ),
    )


class Klass(Strategy):
    """Write sure tokens at positions whose distribution no longer moves."""

    name = "klass"
    paper = "arXiv 2511.05664 (KLASS)"
    summary = "every token that is sure and has been stable for some steps"
    Params = KlassParams
    needs = frozenset({"probabilities"})
    schedule = True

    def __init__(
        self, params: KlassParams, block_length: int, context: Context
    ) -> None:
        super().__init__(params, block_length, context)
        self.state = {
            "tokens": StateField((block_length, REMEMBERED), torch.int32),
            # 0 where there is no such token: nothing was seen, or V is smaller.
            "probabilities": StateField((block_length, REMEMBERED)),
            "stable_steps": StateField((block_length,), torch.int64),
        }

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        now = given(view.probabilities, "probabilities")
        before = view.state["probabilities"]
        moved = divergence(now, before, view.state["tokens"].long())
        stable = (before[..., 0] > 0) & (moved < row_params["kl_threshold"][:, None])
        stable_steps = torch.where(stable, view.state["stable_steps"] + 1, 0)

        sure = view.confidence > row_params["threshold"][:, None]
        rested = stable_steps >= row_params["history"][:, None]
        ready = view.masked & sure & rested
        scheduled = top_masked(view, view.confidence, view.scheduled)
        commit = torch.where(ready.any(dim=1, keepdim=True), ready, scheduled)

        probabilities, tokens = now.top(REMEMBERED)
        missing = (0, REMEMBERED - tokens.shape[-1])
        return Decision(
            commit,
            state={
                "tokens": torch.nn.functional.pad(tokens.int(), missing),
                "probabilities": torch.nn.functional.pad(probabilities, missing),
                "stable_steps": stable_steps,
            },
        )
