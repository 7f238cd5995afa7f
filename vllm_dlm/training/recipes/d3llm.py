# SPDX-License-Identifier: Apache-2.0
"""Pseudo-trajectory distillation: the masks of states that the teacher went through.

d3LLM (hao-ai-lab/d3LLM). As certainty forcing (`certainty.py`), with three
differences: a block's masks are those of a canvas on the way of the teacher's own
decoding, one token per step, in place of random ones; the other way to mask is their
complement, and has no entropy term; blocks and the share of masks grow while training.
Decoded afterwards by `multi_block`, several blocks at once.

The published size of a block is given for each of six epochs, and grows within an
epoch; here it grows linearly to the next epoch's. A row whose trajectory leaves the
block without a mask at that point has random ones, as a row without a trajectory.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dlm import trajectories
from vllm_dlm.cli.arguments import count
from vllm_dlm.tasks.problems import FREE_TASKS
from vllm_dlm.training.recipes import self_made
from vllm_dlm.training.recipes.command import Recipe, Setting, Training
from vllm_dlm.training.recipes.two_ways import (
    Example,
    add_certainty_arguments,
    check_certainty_arguments,
    check_full_attention,
    entropy_settings,
    forward,
    padding_weights,
)
from vllm_dlm.training.rows import Batch, Row, rows_of_step

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.learner import Learner

BLOCK_LENGTHS = (16, 16, 24, 24, 32, 32)
LARGEST_RATIO = 0.8
ENTROPY_WEIGHT = 2.0


@dataclass(frozen=True)
class TrajectoryRow(Row):
    """A prompt, its response, and when the teacher wrote each token of the response."""

    steps: list[int]
    """Number of the step for each token of `response_ids`."""


def block_length(progress: float, lengths: Sequence[int] = BLOCK_LENGTHS) -> int:
    """Tokens of a block after this share of the training (0 to 1, without 1)."""
    epoch, within = divmod(progress * len(lengths), 1.0)
    now = lengths[int(epoch)]
    later = lengths[min(int(epoch) + 1, len(lengths) - 1)]
    return int(now + within * (later - now))


def smallest_ratio(progress: float) -> float:
    """Least share of masks after this share of the training."""
    return LARGEST_RATIO * progress


def corrupt(
    batch: Batch,
    ranks: torch.Tensor,
    block: int,
    ratio: float,
    mask_id: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask a block of each row as the teacher's canvas was, and the other way round.

    Args:
        batch: The rows.
        ranks: How many tokens of its canvas the teacher wrote before each one [R, L];
            -1 throughout a row that has no trajectory.
        block: Tokens b of a block; the last one may have fewer.
        ratio: Least t; t is uniform from there to 0.8 for each row. The canvas is the
            one with n b + floor((1 - t) b) tokens, n the block's number.
        mask_id: Token id of the mask.
        generator: What is drawn from.

    Returns:
        Inputs and targets, both [R, 2, L].
    """
    import torch

    rows, length = batch.ids.shape
    canvas = batch.response.sum(1)
    counts = (canvas + block - 1) // block
    drawn = torch.rand(rows, 2, generator=generator)
    number = (drawn[:, 0] * counts).long().clamp(max=counts - 1)[:, None]
    t = ratio + (LARGEST_RATIO - ratio) * drawn[:, 1:]
    place = torch.arange(length) - batch.prompt_lengths[:, None]
    active = batch.response & (place >= number * block) & (place < (number + 1) * block)
    behind = batch.response & (place >= (number + 1) * block)
    written = number * block + ((1 - t) * block).floor().long()
    first = active & (ranks >= written)
    noise = torch.rand(rows, length, generator=generator)
    random = active & (noise < 0.999 * t + 0.001)
    first = torch.where(first.any(1, keepdim=True), first, random)
    targets = torch.stack((first, active & ~first), 1)
    inputs = batch.ids[:, None].masked_fill(targets | behind[:, None], mask_id)
    return inputs, targets


def loss(missed: torch.Tensor, unsure: torch.Tensor) -> torch.Tensor:
    """What a row contributes [R]: (CE_1 + CE_2 + 2 H_1) / 4.

    Args:
        missed: Cross-entropies of both ways to mask [R, 2].
        unsure: Entropies of both [R, 2].
    """
    return (missed.sum(1) + ENTROPY_WEIGHT * unsure[:, 0]) / 4


def ranks_of(rows: Sequence[Row], batch: Batch) -> torch.Tensor:
    """The order in which canvases were written, as `corrupt` takes it [R, L].

    Tokens of one step come from the left to the right; the canvas behind a response
    comes last.
    """
    import torch

    ranks = torch.full_like(batch.ids, -1)
    for index, row in enumerate(rows):
        steps = getattr(row, "steps", None)
        if steps is None:
            continue
        start, size = len(row.prompt_ids), int(batch.response[index].sum())
        last = max(steps) + 1
        order = torch.tensor([*steps, *[last] * (size - len(steps))]).argsort(
            stable=True
        )
        ranks[index, start : start + size] = order.argsort()
    return ranks


def read_log(path: str | Path, end_id: int) -> list[TrajectoryRow]:
    """The requests of a trajectory log (`--dlm-trajectory-dir`) as rows.

    A response goes up to and with its first end; a token's step is the last one that
    wrote it. Requests without a finished canvas are left out.

    Args:
        path: The log's folder, or a file of it.
        end_id: Token that ends a text.

    Raises:
        ValueError: there is no such log, or no finished request in it.
    """
    rows = []
    for trajectory in trajectories.read(path):
        canvas: list[int] = []
        steps: list[int] = []
        for step in trajectory.steps():
            canvas = step.canvas
            steps += [step.number] * (len(canvas) - len(steps))
            del steps[len(canvas) :]
            for position in step.changed:
                steps[position] = step.number
        if end_id in canvas:
            canvas = canvas[: canvas.index(end_id) + 1]
        if canvas and trajectory.mask not in canvas:
            row = TrajectoryRow(trajectory.prompt, canvas, steps[: len(canvas)])
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no request whose text is finished")
    return rows


def _read(args: argparse.Namespace, learner: Learner) -> Sequence[Row]:
    from vllm_dlm.training.reinforcement.rollouts import Decoder

    check_full_attention(args, learner, "d3llm")
    check_certainty_arguments(args)
    if args.data is not None:
        self_made.check_no_share(args)
        return read_log(args.data, learner.end_id)
    # As published: one token per step.
    decoder = Decoder("static", block_length=learner.attention_block)
    return [
        TrajectoryRow(answer.prompt_ids, answer.response_ids, answer.steps or [])
        for answer in self_made.own_answers(args, learner, decoder)
    ]


def _corrupt(
    training: Training, batch: Batch, generator: torch.Generator, step: int
) -> Example:
    args, learner = training.args, training.learner
    progress = step / training.steps
    rows = rows_of_step(training.rows, args.batch_size, training.seed, step)
    inputs, targets = corrupt(
        batch,
        ranks_of(rows, batch),
        block_length(progress, args.block_lengths),
        smallest_ratio(progress),
        learner.mask_id,
        generator,
    )
    weights = padding_weights(batch, learner.end_id, args.padding_weight)
    return Example(batch.ids, inputs, targets, batch.valid, weights)


def _step_loss(training: Training, example: Example, step: int) -> torch.Tensor:
    args = training.args
    missed, unsure = forward(training.learner, example, args.certainty_temperature)
    return loss(missed, unsure).sum() / args.batch_size


def _decoding(args: argparse.Namespace) -> Mapping[str, Any]:
    """Blocks of the model's own length, several at once, by entropy."""
    return {
        "strategy": "multi_block",
        "strategy_config": {"threshold": args.threshold},
        "block_length": "canvas",
    }


def _settings(args: argparse.Namespace) -> Sequence[Setting]:
    name = f"multi_block {args.threshold:g}"
    return (Setting(name, _decoding(args)), *entropy_settings(args))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_certainty_arguments(parser)
    parser.add_argument(
        "--block-lengths",
        type=count,
        nargs="+",
        default=BLOCK_LENGTHS,
        metavar="B",
        help="tokens of the active block in each of so many equal parts of the "
        "training, growing linearly to the next (published: 16 16 24 24 32 32)",
    )


RECIPE = Recipe(
    name="d3llm",
    summary="be sure early, on states of the model's own trajectories (d3LLM)",
    paper="d3LLM (hao-ai-lab/d3LLM)",
    forwards=2,
    corrupt=_corrupt,
    step_loss=_step_loss,
    read=_read,
    decoding=_decoding,
    settings=_settings,
    # Where several answers are right, tokens depend on each other.
    tasks=FREE_TASKS,
    add_arguments=_add_arguments,
    defaults={"learning_rate": 1e-4, "num_rows": 5000, "threshold": 0.4},
)
add_arguments = RECIPE.add_options
run = RECIPE.run
