# SPDX-License-Identifier: Apache-2.0
"""Every registered strategy, ready to be tried on views."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from reference.views import CPU

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import NOT_DRAFTED, Branches, Strategy, View

OF_EDITING_MODELS = ("levenshtein",)
"""Refused on models that declare no tokens that delete and insert; tested apart."""
OF_CAUSAL_MODELS = ("linear_spec",)
"""Refused on models that are not causal; tested apart."""
OF_RANDOM_TOKENS = ("renoise",)
"""Refused on models that have a mask; tested apart."""
NAMES = [
    name
    for name in STRATEGIES.names()
    if name not in (*OF_EDITING_MODELS, *OF_CAUSAL_MODELS, *OF_RANDOM_TOKENS)
]

# Parameters that have no default.
GIVEN: dict[str, dict[str, Any]] = {"replay": {"recorded_steps": [1, 0, 2, 1]}}

PLAIN = [
    name
    for name in NAMES
    if STRATEGIES[name].soft(STRATEGIES[name].Params(**GIVEN.get(name, {}))) is None
]
"""With their defaults served by engines that make no input embeddings; the others are
tried in `engine/test_soft_inputs.py`."""


def build(name: str, width: int = 8, **params: Any) -> Strategy:
    """A strategy for blocks of `width` positions; what is not given is its default."""
    strategy = STRATEGIES[name]
    params = {**GIVEN.get(name, {}), **params}
    return strategy(strategy.Params(**params), width, CPU)


def without_drafts(view: View) -> View:
    """The view with the one branch that there always is: the canvas as it stands."""
    branches = Branches(
        tokens=view.candidate,
        rank=torch.full_like(view.candidate, NOT_DRAFTED),
        masked=view.masked[:, None],
        candidate=view.candidate[:, None],
        confidence=view.confidence[:, None],
    )
    return replace(view, branches=branches)
