# SPDX-License-Identifier: Apache-2.0
"""A penalty on writing the token to the left once more (SGLang's JointThreshold)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from vllm_dlm.strategies.base import Context, View, given


def penalised(view: View, penalty: float, context: Context) -> View:
    """The view, with the logit of each position's left neighbour lowered there.

    The most probable token gives way to the next one where that is more probable then.
    Another one that was drawn stays. Of texts with a pattern all candidates stay, and
    are less sure.
    """
    now = given(view.probabilities, "probabilities")
    kept = math.exp(-penalty)
    # What is left of the block is not looked at, and a mask is no token.
    follows = (view.decided | (view.positions < 0)).roll(1, dims=1)
    follows[:, 0] = False
    before = torch.where(follows, view.tokens.roll(1, dims=1), 0)
    repeated = torch.where(follows, now.of(before[..., None])[..., 0], 0.0)
    total = 1 - repeated * (1 - kept)
    is_repeat = follows & (view.candidate == before)
    confidence = torch.where(is_repeat, view.confidence * kept, view.confidence)

    probabilities, tokens = now.top(2)
    if tokens.shape[-1] == 2 and not context.has_pattern:
        second = probabilities[..., 1]
        is_best = view.candidate == tokens[..., 0]
        equal = (second == confidence) & (tokens[..., 1] < view.candidate)
        gives_way = is_repeat & is_best & ((second > confidence) | equal)
        candidate = torch.where(gives_way, tokens[..., 1], view.candidate)
        confidence = torch.where(gives_way, second, confidence)
        view = replace(view, candidate=candidate)
    return replace(view, confidence=confidence / total)
