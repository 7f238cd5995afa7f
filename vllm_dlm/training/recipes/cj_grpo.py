# SPDX-License-Identifier: Apache-2.0
"""CJ-GRPO: policy gradients on exactly the canvases that were visited.

A token's ratio is computed on the canvas of the step that wrote it (consistency of
trajectories). Pairs with decoders of few steps, because it needs a forward per step.

Source: arXiv 2509.23924 (yjyddq/EOSER-ASS-RL).
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vllm_dlm.training.reinforcement.loop import Method, Scored, make_recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vllm_dlm.training.reinforcement.policy import Term
    from vllm_dlm.training.reinforcement.rollout_rows import RollOuts


def terms(
    rollouts: RollOuts,
    advantage: Tensor,
    *,
    beta: float,
    kept: Tensor | None = None,
    scored: Tensor | None = None,
    rows_at_once: int | None = None,
) -> list[Term]:
    """Terms of the loss: its mean over steps, within a step over tokens of all rows.

    Each step weighs the same, however many tokens it wrote.

    Args:
        rollouts: R rows.
        advantage: [R].
        beta: Weight of the divergence from the reference.
        kept: [R] bool: rows to score; the others count in the means all the same.
        scored: [R, L] bool: tokens that count; by default all that were written, those
            behind the end of a text too.
        rows_at_once: Rows that go through the network at once.
    """
    from vllm_dlm.training.reinforcement.policy import trajectory_terms

    counts = rollouts.steps >= 0
    if scored is not None:
        counts = counts & scored
    steps = rollouts.steps.clamp(min=0)
    written = counts.new_zeros(rollouts.num_steps, dtype=advantage.dtype)
    written.scatter_add_(0, steps[counts], written.new_ones(int(counts.sum())))
    num_steps = (written > 0).sum()
    weights = counts / (num_steps * written.clamp(min=1)[steps])
    return trajectory_terms(
        rollouts, advantage, weights, beta * weights, kept, rows_at_once
    )


def _objective(
    args: argparse.Namespace, scored: Scored, generator: torch.Generator
) -> list[Term]:
    del generator
    return terms(
        scored.rollouts,
        scored.advantage,
        beta=args.beta,
        kept=scored.kept,
        scored=scored.tokens,
        rows_at_once=scored.rows_at_once,
    )


RECIPE = make_recipe(
    Method(objective=_objective, redraws=False, baseline="mean"),
    name="cj-grpo",
    summary="reinforcement learning on the canvases that were visited (CJ-GRPO)",
    paper="CJ-GRPO, arXiv 2509.23924",
    defaults={},
)
add_arguments = RECIPE.add_options
run = RECIPE.run
