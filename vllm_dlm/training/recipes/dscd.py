# SPDX-License-Identifier: Apache-2.0
"""Discrete-space consistency distillation: many masks are to read like few.

CD4LM (yihao-liang/CDLM). The student sees an answer with many masks, the teacher, which
is the same model before the training, the same answer with a part of these masks; the
student learns what the teacher predicts, and the answer's tokens. Decoded afterwards by
`cad`.

Differences from the published code: an answer's end is one of its tokens, so that the
student learns to end; what follows it in the canvas is masked for both, as it is while
decoding; the teacher attends to no more than the student; the teacher's ratio follows
from the student's as it is after the cap on short answers, so that it always sees
more. With an adapter the teacher is the same network with the adapter off. Losses are
means over a row's masks, bounded there, and then means over the rows.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_dlm.tasks.problems import FREE_TASKS
from vllm_dlm.training.recipes import self_made
from vllm_dlm.training.recipes.command import Recipe, Setting, Training
from vllm_dlm.training.recipes.two_ways import (
    check_full_attention,
    check_range,
    row_means,
)
from vllm_dlm.training.rows import Batch, Row

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.learner import Learner

TEMPERATURE = 2.0
# Of a row's divergence, and of its cross-entropy. Beyond it there is no gradient.
LARGEST_LOSS = 5.0
STUDENT_RATIOS = (0.40, 0.90)
TEACHER_FACTORS = (0.30, 0.70)
TEACHER_RATIOS = (0.10, 0.60)
# An answer shorter than this has at most half of its tokens masked.
SHORT, SHORT_RATIO = 20, 0.5
# One of at most so many tokens has two masks for the student, one for the teacher.
SHORTEST, SHORTEST_COUNTS = 10, (2, 1)
# Share of the divergence in the loss: at first, at last, and when it begins to fall.
FIRST_SHARE, LAST_SHARE, FALL = 0.9, 0.5, 0.1


@dataclass(frozen=True)
class Example:
    """Rows of a step.

    Args:
        ids: Clean token ids [R, L].
        inputs: What the student sees [R, L].
        teacher_inputs: What the teacher sees [R, L].
        targets: Bool [R, L], the student's masks in the answer.
        valid: Bool [R, L], False behind a row's canvas.
    """

    ids: torch.Tensor
    inputs: torch.Tensor
    teacher_inputs: torch.Tensor
    targets: torch.Tensor
    valid: torch.Tensor


def ratios(
    length: int, student: float, factor: float, *, short_caps: bool = True
) -> tuple[float, float]:
    """Shares of an answer that are masked for the student and for the teacher.

    Args:
        length: Tokens of the answer.
        student: The student's share, as it was drawn.
        factor: The teacher's as a part of the student's.
        short_caps: Mask at most half of an answer of fewer than 20 tokens.
    """
    if short_caps and length < SHORT:
        student = min(student, SHORT_RATIO)
    low, high = TEACHER_RATIOS
    return student, min(max(student * factor, low), high)


def mask_counts(
    length: int, student: float, teacher: float, *, short_caps: bool = True
) -> tuple[int, int]:
    """How many tokens of an answer are masked for the student and for the teacher.

    Args:
        length: Tokens of the answer.
        student: The student's share.
        teacher: The teacher's share.
        short_caps: Answers of at most 10 tokens have 2 masks and 1.
    """
    if short_caps and length <= SHORTEST:
        many, few = SHORTEST_COUNTS
    else:
        many = max(_floor(length * student), 2, math.ceil(0.1 * length))
        few = min(_floor(length * teacher), many)
    return min(many, length), min(few, length)


def _floor(product: float) -> int:
    # 100 * 0.29 is a little below 29.
    return math.floor(product + 1e-9)


def corrupt(
    batch: Batch,
    mask_id: int,
    end_id: int,
    generator: torch.Generator,
    *,
    short_caps: bool = True,
) -> Example:
    """Mask each row's answer for the student, and a part of that for the teacher.

    Args:
        batch: The rows; an answer goes up to and with its first end token.
        mask_id: Token id of the mask.
        end_id: Token that ends an answer and fills the canvas behind it.
        generator: What is drawn from.
        short_caps: The published bounds on the masks of short answers.
    """
    import torch

    ends = (batch.ids == end_id) & batch.response
    answer = batch.response & (ends.int().cumsum(1) - ends.int() == 0)
    drawn = torch.rand(len(batch.ids), 2, generator=generator)
    counts = []
    for length, (one, other) in zip(
        answer.sum(1).tolist(), drawn.tolist(), strict=True
    ):
        student = _between(STUDENT_RATIOS, one)
        factor = _between(TEACHER_FACTORS, other)
        shares = ratios(length, student, factor, short_caps=short_caps)
        counts.append(mask_counts(length, *shares, short_caps=short_caps))
    noise = torch.rand(batch.ids.shape, generator=generator)
    # Rank of each position of the answer in a random order of its row.
    order = noise.masked_fill(~answer, 2.0).argsort(1)
    rank = order.argsort(1)
    many, few = torch.tensor(counts)[:, :, None].unbind(1)
    student_masks = answer & (rank < many)
    teacher_masks = answer & (rank < few)
    behind = batch.response & ~answer
    return Example(
        ids=batch.ids,
        inputs=batch.ids.masked_fill(student_masks | behind, mask_id),
        teacher_inputs=batch.ids.masked_fill(teacher_masks | behind, mask_id),
        targets=student_masks,
        valid=batch.valid,
    )


def _between(bounds: tuple[float, float], share: float) -> float:
    low, high = bounds
    return low + (high - low) * share


def divergences(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float = TEMPERATURE
) -> torch.Tensor:
    """T² KL(teacher || student) of softmax(logits / T), [N] of logits [N, V]."""
    wanted = (teacher.float() / temperature).log_softmax(-1)
    given = (student.float() / temperature).log_softmax(-1)
    return temperature**2 * (wanted.exp() * (wanted - given)).sum(-1)


def share_of_divergence(progress: float) -> float:
    """Lambda, after this share of the optimizer steps (0 to 1)."""
    if progress < FALL:
        return FIRST_SHARE
    done = (progress - FALL) / (1 - FALL)
    fallen = 0.5 * (1 - math.cos(math.pi * done))
    return FIRST_SHARE + (LAST_SHARE - FIRST_SHARE) * fallen


def loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    tokens: torch.Tensor,
    rows: torch.Tensor,
    num_rows: int,
    *,
    share: float,
    temperature: float = TEMPERATURE,
    clamp_tokens: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence from the teacher and cross-entropy of each row.

    Args:
        student: Logits of the student's masks [N, V].
        teacher: The teacher's there, on its own input [N, V]; no gradient goes there.
        tokens: The true tokens [N].
        rows: Which row each belongs to [N].
        num_rows: How many rows there are.
        share: Lambda, of the divergence.
        temperature: Of both distributions in the divergence.
        clamp_tokens: Bound each token's two losses by 5 T²; by default a row's two
            means are bounded by 5, beyond which the row has no gradient.

    Returns:
        Losses [num_rows], and the share of each row's bounded values that were beyond
        their bound [num_rows].
    """
    import torch
    import torch.nn.functional as F

    losses = torch.stack(
        (
            divergences(student, teacher.detach(), temperature),
            F.cross_entropy(student.float(), tokens, reduction="none"),
        )
    )
    most = LARGEST_LOSS * temperature**2 if clamp_tokens else LARGEST_LOSS
    if clamp_tokens:
        beyond = (losses > most).float()
        losses = losses.clamp(max=most)
    ones = losses.new_ones(len(tokens))

    def by_row(values: torch.Tensor) -> torch.Tensor:
        return row_means(values, ones, rows, num_rows)

    divergence, missed = by_row(losses[0]), by_row(losses[1])
    if clamp_tokens:
        bitten = by_row(beyond.mean(0))
    else:
        bitten = ((divergence > most).float() + (missed > most).float()) / 2
        divergence, missed = divergence.clamp(max=most), missed.clamp(max=most)
    return share * divergence + (1 - share) * missed, bitten


def _corrupt(
    training: Training, batch: Batch, generator: torch.Generator, step: int
) -> Example:
    learner, args = training.learner, training.args
    return corrupt(
        batch,
        learner.mask_id,
        learner.end_id,
        generator,
        short_caps=args.short_caps == "on",
    )


def _step_loss(training: Training, example: Example, step: int) -> torch.Tensor:
    learner, args = training.learner, training.args
    with training.initial() as teacher:
        wanted = teacher.logits_at(
            example.teacher_inputs, example.valid, example.targets
        )
    logits = learner.logits_at(example.inputs, example.valid, example.targets)
    losses, bitten = loss(
        logits,
        wanted,
        example.ids[example.targets],
        example.targets.nonzero()[:, 0],
        len(example.ids),
        share=share_of_divergence(step / training.steps),
        temperature=args.distillation_temperature,
        clamp_tokens=args.clamp == "token",
    )
    training.note(beyond_clamp=bitten.sum() / args.batch_size)
    return losses.sum() / args.batch_size


def _read(args: argparse.Namespace, learner: Learner) -> Sequence[Row]:
    check_full_attention(args, learner, "dscd")
    check_range(args, "distillation_temperature", 1e-3)
    check_range(args, "threshold", 1e-6, 2)
    return self_made.read(args, learner)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    self_made.add_arguments(parser)
    parser.add_argument(
        "--short-caps",
        choices=("on", "off"),
        default="on",
        help="published bounds on short answers: at most half of fewer than 20 tokens "
        "are masked, and 2 of at most 10. With them, what decoding begins with, "
        "nothing but masks, is never learnt on such answers (off is ours)",
    )
    parser.add_argument(
        "--distillation-temperature",
        type=float,
        default=TEMPERATURE,
        metavar="T",
        help="of both distributions whose divergence is taken (%(default)s)",
    )
    parser.add_argument(
        "--clamp",
        choices=("row", "token"),
        default="row",
        help="bound a row's mean losses by 5, as published, or each token's by 5 T²: "
        "beyond the bound there is no gradient (the metric beyond_clamp)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.95,
        help="least probability at which a token is written afterwards (%(default)s)",
    )


def _decoding(args: argparse.Namespace) -> Mapping[str, Any]:
    config = {"threshold": args.threshold, "most": 32, "release_end": 0.3}
    return {"strategy": "cad", "strategy_config": config}


def _settings(args: argparse.Namespace) -> Sequence[Setting]:
    return (
        Setting(f"cad {args.threshold:g}", _decoding(args)),
        *(
            Setting(
                f"{strategy} {value:g}",
                {"strategy": strategy, "strategy_config": {"threshold": value}},
            )
            for strategy, value in (
                ("entropy", 0.1),
                ("entropy", 0.5),
                ("threshold", 0.9),
                ("threshold", 0.95),
            )
        ),
        Setting(
            "static, 4 tokens per step", {"strategy": "static", "steps_per_block": 8}
        ),
    )


RECIPE = Recipe(
    name="dscd",
    summary="predict from many masks what is predicted from few, for `cad` (CD4LM)",
    paper="CD4LM (yihao-liang/CDLM)",
    corrupt=_corrupt,
    step_loss=_step_loss,
    read=_read,
    decoding=_decoding,
    settings=_settings,
    # Where several answers are right, tokens depend on each other.
    tasks=FREE_TASKS,
    add_arguments=_add_arguments,
    defaults={"learning_rate": 1e-4, "num_rows": 5000},
)
add_arguments = RECIPE.add_options
run = RECIPE.run
