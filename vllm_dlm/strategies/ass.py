# SPDX-License-Identifier: Apache-2.0
"""Ascending step size (ASS): each step writes twice as many tokens as the one before.

Of the L masks that a block began with, step s writes the 2^s most confident, and step
S - 1 all that are left: S = floor(log2 L), at least 1. 256 masks take 8 steps, of 1, 2,
4, 8, 16, 32, 64 and 129 tokens. Later steps see more text, so they can be trusted with
more at a time; the last one writes half of the block at once, all the same.

Source: arXiv 2509.23924, and yjyddq/EOSER-ASS-RL's code with one block.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_dlm.strategies.base import (
    AnyParams,
    Decision,
    StateField,
    Strategy,
    View,
    top_masked,
)


class Ass(Strategy):
    """Write the most confident tokens: 1, 2, 4, ..., and then the rest."""

    name = "ass"
    paper = "arXiv 2509.23924 (EOSER and ASS)"
    summary = "twice as many tokens as in the step before"
    state = {"masks": StateField(dtype=torch.int64)}
    scope = "canvas"

    def reference_steps(self, params: AnyParams, steps: int) -> int | None:
        """Those of its own schedule."""
        return doubling_length(self.block_length)

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        masks = masks_at_first(view)
        count = doubling_count(view.step, masks)
        commit = top_masked(view, view.confidence, count)
        return Decision(commit, state={"masks": masks})


def masks_at_first(view: View) -> torch.Tensor:
    """[R] int64: masks in the block's first step, kept as the state "masks"."""
    return torch.where(view.step == 0, view.masks_to_divide(), view.state["masks"])


def doubling_steps(masks: torch.Tensor) -> torch.Tensor:
    """[R] int64: steps for blocks of `masks` [R] int64: floor(log2 L), at least 1."""
    # Counted, because a logarithm may round, and inductor (torch 2.13) generates C++
    # of frexp that does not compile.
    powers = 2 ** torch.arange(1, 32, device=masks.device)
    return (masks[:, None] >= powers).sum(dim=1).clamp(min=1)


def doubling_length(masks: int) -> int:
    """The same for one block."""
    return max(masks.bit_length() - 1, 1)


def doubling_count(step: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """[R] int64: tokens of step `step` [R] of such a block.

    In its last step the rest; later all that is left, where not all could be seen.
    """
    last = doubling_steps(masks) - 1
    before = 2 ** torch.minimum(step, last)
    count = torch.where(step < last, before, masks - before + 1)
    return torch.where(step > last, masks, count)
