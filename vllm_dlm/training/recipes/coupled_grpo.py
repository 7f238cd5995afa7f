# SPDX-License-Identifier: Apache-2.0
"""Coupled-GRPO: three forwards score an answer, whatever decoder wrote it.

Each token is scored once with the whole answer masked, and once with a random part of
it masked: two complementary parts, so that each token is in one.

Source: DiffuCoder, arXiv 2506.20639 (apple/ml-diffucoder). The estimate `one-step` is
d1's diffu-GRPO (arXiv 2504.12216): one forward, with the answer masked and a share of
the prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from vllm_dlm.training.reinforcement.loop import Method, Scored, make_recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vllm_dlm.training.reinforcement.policy import Term
    from vllm_dlm.training.reinforcement.rollout_rows import RollOuts
    from vllm_dlm.training.reinforcement.rollouts import LogitsAt

LEAST_SHARE, MOST_SHARE = 0.2, 0.8
"""Between which the share r of the first part is drawn."""

PROMPT_SHARE = 0.15
"""Of the prompt, that `one-step` masks."""


@dataclass(frozen=True)
class Masks:
    """What an inner update masks; the same for the old and the new network.

    Args:
        share: r, the expected share of the answer in the first part.
        first: [R, L] bool: the first part D of the canvas.
        prompt: [R, L] bool: masked tokens of the prompt.
    """

    share: float
    first: Tensor
    prompt: Tensor


def draw_masks(
    rollouts: RollOuts, generator: torch.Generator, prompt_share: float = 0.0
) -> Masks:
    """Masks of an inner update.

    Args:
        rollouts: R rows.
        generator: on the CPU; the same state gives the same masks.
        prompt_share: of the prompts' tokens to be masked.
    """
    import torch

    drawn = torch.rand((), generator=generator)
    share = LEAST_SHARE + (MOST_SHARE - LEAST_SHARE) * float(drawn)
    device, shape = rollouts.ids.device, rollouts.ids.shape
    in_answer = torch.rand(shape, generator=generator).to(device)
    in_prompt = torch.rand(shape, generator=generator).to(device)
    response = rollouts.response
    return Masks(
        share=share,
        first=(in_answer < share) & response,
        prompt=(in_prompt < prompt_share) & rollouts.valid & ~response,
    )


def coupled_estimate(
    logits_at: LogitsAt, rollouts: RollOuts, scored: Tensor, masks: Masks
) -> Tensor:
    """[N]: half of a token's log-probability with all masked, and half of that with its
    part masked, divided by the part's expected share.

    No log-probability any more: only differences of it say something.

    Args:
        logits_at: the network.
        rollouts: R rows.
        scored: [R, L] bool, N tokens.
        masks: of the update.
    """
    response = rollouts.response
    estimate = _score(logits_at, rollouts, response, scored)
    rest = response & ~masks.first
    for part, share in ((masks.first, masks.share), (rest, 1 - masks.share)):
        chosen = scored & part
        if chosen.any():
            found = _score(logits_at, rollouts, part, chosen) / share
            estimate = estimate.index_add(0, chosen[scored].nonzero()[:, 0], found)
    return estimate / 2


def one_step_estimate(
    logits_at: LogitsAt, rollouts: RollOuts, scored: Tensor, masks: Masks
) -> Tensor:
    """[N]: log-probabilities with the whole answer and `masks.prompt` masked."""
    return _score(logits_at, rollouts, rollouts.response | masks.prompt, scored)


Estimate = Callable[["LogitsAt", "RollOuts", "Tensor", Masks], "Tensor"]

ESTIMATES: dict[str, Estimate] = {
    "coupled": coupled_estimate,
    "one-step": one_step_estimate,
}


def terms(
    rollouts: RollOuts,
    advantage: Tensor,
    masks: Masks,
    *,
    beta: float,
    scored: Tensor,
    estimate: str = "coupled",
    kept: Tensor | None = None,
    rows_at_once: int | None = None,
) -> list[Term]:
    """Terms of the loss: its mean over the tokens of all rows.

    Args:
        rollouts: R rows.
        advantage: [R].
        masks: of the inner update.
        beta: Weight of the divergence from the reference.
        scored: [R, L] bool: tokens that count.
        estimate: of `ESTIMATES`.
        kept: [R] bool: rows to score; the others count in the mean all the same.
        rows_at_once: Rows that go through the network at once.
    """
    from vllm_dlm.training.reinforcement.policy import Term, parts_of

    weight = 1 / scored.sum().clamp(min=1)
    rows = scored.any(1) if kept is None else scored.any(1) & kept
    numbers = rows.nonzero()[:, 0]
    found = []
    for part in parts_of(len(numbers), rows_at_once):
        some = numbers[part]
        counted = scored[some]
        own = Masks(masks.share, masks.first[some], masks.prompt[some])
        score = partial(
            _estimated,
            estimate=ESTIMATES[estimate],
            rollouts=rollouts.take(some),
            scored=counted,
            masks=own,
        )
        weights = weight.expand(int(counted.sum()))
        of_row = advantage[some][:, None].expand(counted.shape)
        found.append(Term(score, of_row[counted], weights, beta * weights))
    return found


def _estimated(
    logits_at: LogitsAt,
    *,
    estimate: Estimate,
    rollouts: RollOuts,
    scored: Tensor,
    masks: Masks,
) -> Tensor:
    return estimate(logits_at, rollouts, scored, masks)


def _score(
    logits_at: LogitsAt, rollouts: RollOuts, masked: Tensor, scored: Tensor
) -> Tensor:
    from vllm_dlm.training.reinforcement.policy import token_log_probabilities

    return token_log_probabilities(
        logits_at,
        rollouts.ids.masked_fill(masked, rollouts.mask_id),
        rollouts.valid,
        scored,
        rollouts.ids[scored],
        rollouts.mask_id,
    )


def _objective(
    args: argparse.Namespace, scored: Scored, generator: torch.Generator
) -> list[Term]:
    share = PROMPT_SHARE if args.estimate == "one-step" else 0.0
    return terms(
        scored.rollouts,
        scored.advantage,
        draw_masks(scored.rollouts, generator, share),
        beta=args.beta,
        scored=scored.tokens,
        estimate=args.estimate,
        kept=scored.kept,
        rows_at_once=scored.rows_at_once,
    )


def _more_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--estimate",
        choices=tuple(ESTIMATES),
        default="coupled",
        help="how tokens are scored: with all of the answer masked, and with one of "
        "two complementary parts of it; or (d1) with all of it masked alone",
    )


RECIPE = make_recipe(
    Method(objective=_objective, redraws=True, baseline="leave-one-out"),
    name="coupled-grpo",
    summary="reinforcement learning with three forwards an update (coupled-GRPO)",
    paper="DiffuCoder, arXiv 2506.20639",
    defaults={"epsilon": 0.5, "until_end": True},
    more_arguments=_more_arguments,
)
add_arguments = RECIPE.add_options
run = RECIPE.run
