# SPDX-License-Identifier: Apache-2.0
"""TraceRL: policy gradients along the trajectory, some steps at a time.

As CJ-GRPO, but `shrink` neighbouring steps are one state, and each state of each row
weighs the same. A step map says all that it needs. The value model of the source, which
is optional there, is left out.

Source: arXiv 2509.06949 (Gen-Verse/dLLM-RL).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_dlm.cli.arguments import count
from vllm_dlm.training.reinforcement.loop import Method, Scored, make_recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vllm_dlm.training.reinforcement.policy import Term
    from vllm_dlm.training.reinforcement.rollout_rows import RollOuts


def shrunk(rollouts: RollOuts, shrink: int) -> RollOuts:
    """The same answers, with `shrink` neighbouring steps counted as one."""
    steps = rollouts.steps.div(shrink, rounding_mode="floor")
    return replace(rollouts, steps=steps)


def terms(
    rollouts: RollOuts,
    advantage: Tensor,
    *,
    beta: float,
    shrink: int = 1,
    kept: Tensor | None = None,
    scored: Tensor | None = None,
    rows_at_once: int | None = None,
) -> list[Term]:
    """Terms of the loss: its mean over pairs of a row and one of the row's states.

    The divergences of a pair's tokens are added up, not averaged.

    Args:
        rollouts: R rows.
        advantage: [R].
        beta: Weight of the divergence from the reference, which is the network before
            the inner updates.
        shrink: Steps of a state.
        kept: [R] bool: rows to score; the others count in the mean all the same.
        scored: [R, L] bool: tokens that count; by default all that were written.
        rows_at_once: Rows that go through the network at once.
    """
    from vllm_dlm.training.reinforcement.policy import trajectory_terms

    states = shrunk(rollouts, shrink)
    counts = states.steps >= 0
    if scored is not None:
        counts = counts & scored
    steps = states.steps.clamp(min=0)
    written = counts.new_zeros(
        (len(steps), states.num_steps), dtype=advantage.dtype
    ).scatter_add_(1, steps, counts.to(advantage.dtype))
    pairs = (written > 0).sum()
    weights = counts / (pairs * written.clamp(min=1).gather(1, steps))
    return trajectory_terms(
        states,
        advantage,
        weights,
        beta * counts / pairs,
        kept,
        rows_at_once,
        against_old=True,
    )


def _objective(
    args: argparse.Namespace, scored: Scored, generator: torch.Generator
) -> list[Term]:
    del generator
    return terms(
        scored.rollouts,
        scored.advantage,
        beta=args.beta,
        shrink=args.shrink,
        kept=scored.kept,
        scored=scored.tokens,
        rows_at_once=scored.rows_at_once,
    )


def _more_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shrink", type=count, default=1, help="neighbouring steps that are one state"
    )


RECIPE = make_recipe(
    Method(objective=_objective, redraws=False, baseline="z-score", against_old=True),
    name="tracerl",
    summary="reinforcement learning along the trajectory (TraceRL)",
    paper="TraceRL, arXiv 2509.06949",
    defaults={"beta": 0.01, "max_norm": 1.0},
    more_arguments=_more_arguments,
)
add_arguments = RECIPE.add_options
run = RECIPE.run
