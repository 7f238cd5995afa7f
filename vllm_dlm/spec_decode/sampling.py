# SPDX-License-Identifier: Apache-2.0
"""Draft tokens drawn from a drafter's logits, and the distribution they came from.

Verification at temperature > 0 accepts a token with min(1, p / q) and is lossless only
if q is exactly what the token was drawn from: what is forbidden, and top-k and top-p,
come before q is normalised. The noise is that of `kernels/draw.py`, a hash of seed and
position, so that a request's drafts do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_dlm.kernels.draw import draw, tempered

DRAFT_STEP = -2
"""Stands in the hash where a denoise step's number is; no denoise step has it."""


def draw_drafts(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    banned_ids: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row, and its distribution.

    Args:
        logits: [N, V], of the drafter.
        temperature: [N]; 0 is greedy: the argmax, and a distribution of 1 on it.
        top_k: [N] integer; 0 or less is off.
        top_p: [N] in (0, 1]; 1 is off.
        seeds: [N] int64.
        positions: [N] int64, of the drafted token in its request.
        banned_ids: tokens that are never drafted (a mask token).

    Returns:
        Tokens [N] int64 and probabilities [N, V] float32.
    """
    scores = logits.float()
    if banned_ids:
        scores = scores.index_fill(
            1, torch.tensor(list(banned_ids), device=scores.device), -torch.inf
        )
    argmax = scores.argmax(dim=1)
    min_p = torch.zeros_like(top_p)
    steps = torch.full_like(seeds, DRAFT_STEP)
    tokens = draw(
        scores, argmax, temperature, top_k, top_p, min_p, seeds, positions, steps
    )
    greedy = temperature <= 0
    warm = torch.where(greedy, 1.0, temperature)
    probs = tempered(scores, warm, top_k, top_p, min_p).softmax(dim=1)
    certain = torch.zeros_like(probs).scatter_(1, argmax[:, None], 1.0)
    return tokens, torch.where(greedy[:, None], certain, probs)
