# SPDX-License-Identifier: Apache-2.0
"""Certainty forcing: to be sure early, on answers of the model's own.

dParallel (arXiv 2509.26488; czg1225/dParallel). A block of the answer is seen twice,
masked in two complementary ways; besides learning the tokens, the model lowers its
entropy where it is right. Decoded afterwards by `entropy`, which writes every token
of little entropy.

Three things differ from the published code. Each row has a block and masks of its own,
also where several rows are a batch; the blocks that are drawn are never empty; and the
entropy is computed from log-softmax, so that a probability of 0 is no trouble. Losses
are means over the masked tokens of a row, then over the rows, which is what the
published code does with its batches of one row.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_dlm.cli.arguments import count
from vllm_dlm.tasks.problems import FREE_TASKS
from vllm_dlm.training.recipes import self_made
from vllm_dlm.training.recipes.command import Recipe, Training
from vllm_dlm.training.recipes.two_ways import (
    Example,
    add_certainty_arguments,
    check_certainty_arguments,
    check_range,
    entropy_decoding,
    entropy_settings,
    forward,
    padding_weights,
)
from vllm_dlm.training.rows import Batch, Row

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.learner import Learner

BLOCK_LENGTH = 32
# Of the entropies; the published values, for LLaDA and for Dream, which has a shift.
BETA, BETA_SHIFTED = 2.0, 1.0


def draw_blocks(
    batch: Batch,
    block_length: int,
    end_id: int,
    generator: torch.Generator,
    *,
    first_share: float = 0.0,
    padding_share: float = 1.0,
    before: torch.Tensor | int = 0,
) -> torch.Tensor:
    """The number of each row's active block [R], from 0 where the canvas begins.

    Args:
        batch: The rows.
        block_length: Tokens of a block; the last one may have fewer.
        end_id: Token behind a text.
        generator: What is drawn from.
        first_share: Share of the rows that take block 0 without a draw.
        padding_share: Weight of a block that has nothing but end tokens behind the
            text's own, against 1 of the others.
        before: Tokens of the prompt in block 0 [R]: `tokens_before`.
    """
    import torch

    canvas = batch.response.sum(1)
    ends = (batch.ids == end_id) & batch.response
    first_end = ends.int().argmax(1) - batch.prompt_lengths + 1
    text = torch.where(ends.any(1), first_end, canvas)
    canvas, text = canvas + before, text + before
    counts = (canvas + block_length - 1) // block_length
    begins = torch.arange(int(counts.max())) * block_length
    weights = torch.where(begins < text[:, None], 1.0, padding_share)
    weights = weights.masked_fill(begins >= canvas[:, None], 0.0)
    shares = weights.cumsum(1) / weights.sum(1, keepdim=True)
    drawn = torch.rand(len(canvas), 2, generator=generator)
    # The shares may add up to a little less than 1.
    blocks = (drawn[:, :1] >= shares).sum(1).minimum(counts - 1)
    return blocks.masked_fill(drawn[:, 1] < first_share, 0)


def tokens_before(batch: Batch, attention_block: int | None) -> torch.Tensor | int:
    """How many tokens of the prompt share a block with the canvas's first [R].

    Only block-causal models, which count blocks from the first token, have some.
    """
    if attention_block is None:
        return 0
    return batch.prompt_lengths % attention_block


def corrupt(
    batch: Batch,
    blocks: torch.Tensor,
    block_length: int,
    mask_id: int,
    generator: torch.Generator,
    *,
    ratio: tuple[float, float] = (0.5, 0.5),
    full_share: float = 0.0,
    before: torch.Tensor | int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask each row's active block in two complementary ways.

    What is to the left of the block stays as it is, everything to its right is masked.

    Args:
        batch: The rows.
        blocks: Number of each row's active block [R].
        block_length: Tokens of a block.
        mask_id: Token id of the mask.
        generator: What is drawn from.
        ratio: Bounds of t, uniform for each row; a token of the block is in the first
            way's masks with probability 0.999 t + 0.001.
        full_share: Share of the rows whose whole block is in the first way's masks,
            as in the first step of decoding, and nothing in the second's.
        before: Tokens of the prompt in block 0 [R], as of `draw_blocks`.

    Returns:
        Inputs and targets, both [R, 2, L].
    """
    import torch

    rows, length = batch.ids.shape
    place = torch.arange(length) - (batch.prompt_lengths - before)[:, None]
    begin = (blocks * block_length)[:, None]
    active = batch.response & (place >= begin) & (place < begin + block_length)
    behind = batch.response & (place >= begin + block_length)
    low, high = ratio
    t = low + (high - low) * torch.rand(rows, 1, generator=generator)
    probability = (1 - 1e-3) * t + 1e-3
    full = torch.rand(rows, 1, generator=generator) < full_share
    drawn = torch.rand(rows, length, generator=generator)
    first = active & ((drawn < probability) | full)
    targets = torch.stack((first, active & ~first), 1)
    inputs = batch.ids[:, None].masked_fill(targets | behind[:, None], mask_id)
    return inputs, targets


def loss(missed: torch.Tensor, unsure: torch.Tensor, beta: float) -> torch.Tensor:
    """What a row contributes [R]: CE_1 + CE_2 + beta (H_1 + H_2).

    Args:
        missed: Cross-entropies of both ways to mask [R, 2].
        unsure: Entropies of both [R, 2].
        beta: Weight of the entropies.
    """
    return (missed + beta * unsure).sum(1)


def _corrupt(
    training: Training, batch: Batch, generator: torch.Generator, step: int
) -> Example:
    args, learner = training.args, training.learner
    length = args.block_length or int(batch.response.sum(1).max())
    before = tokens_before(batch, learner.attention_block)
    blocks = draw_blocks(
        batch,
        length,
        learner.end_id,
        generator,
        first_share=args.first_block,
        padding_share=args.padding_blocks,
        before=before,
    )
    inputs, targets = corrupt(
        batch,
        blocks,
        length,
        learner.mask_id,
        generator,
        ratio=tuple(args.mask_ratio),
        full_share=args.full_mask,
        before=before,
    )
    weights = padding_weights(batch, learner.end_id, args.padding_weight)
    return Example(batch.ids, inputs, targets, batch.valid, weights)


def _step_loss(training: Training, example: Example, step: int) -> torch.Tensor:
    args = training.args
    missed, unsure = forward(training.learner, example, args.certainty_temperature)
    training.note(
        cross_entropy=missed.detach().sum() / args.batch_size,
        entropy=unsure.detach().sum() / args.batch_size,
    )
    return loss(missed, unsure, _beta(training)).sum() / args.batch_size


def _beta(training: Training) -> float:
    beta = training.args.beta
    if beta is None:
        return BETA_SHIFTED if training.learner.shift else BETA
    return float(beta)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_certainty_arguments(parser)
    self_made.add_round_arguments(parser)
    parser.add_argument(
        "--beta",
        type=float,
        help=f"weight of the entropy (published: {BETA:g}, for a model with a shift "
        f"{BETA_SHIFTED:g})",
    )
    parser.add_argument(
        "--block-length",
        type=count,
        metavar="B",
        help=f"tokens of the active block (published: {BLOCK_LENGTH}, for a model with "
        "a shift the whole canvas)",
    )
    parser.add_argument(
        "--mask-ratio",
        type=float,
        nargs=2,
        default=(0.5, 0.5),
        metavar=("LOW", "HIGH"),
        help="share of the block in the first way's masks, drawn for each row "
        "(published: 0.5)",
    )
    parser.add_argument(
        "--full-mask",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the rows whose block is all masks, as in the first step of "
        "decoding (ours; published: none)",
    )
    parser.add_argument(
        "--first-block",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the rows whose active block is the first one, without a draw",
    )
    parser.add_argument(
        "--padding-blocks",
        type=float,
        default=1.0,
        metavar="W",
        help="weight of blocks behind the text's end in the draw of the active block "
        "(published: %(default)s)",
    )


def _read(args: argparse.Namespace, learner: Learner) -> Sequence[Row]:
    low, high = args.mask_ratio
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"--mask-ratio: expected 0 <= LOW <= HIGH <= 1, not {low} {high}"
        )
    for name in ("full_mask", "first_block"):
        check_range(args, name, 0, 1)
    for name in ("padding_blocks", "beta"):
        check_range(args, name, 0)
    check_certainty_arguments(args)
    block = learner.attention_block
    if block is not None and args.block_length not in (None, block):
        raise ValueError(
            f"--block-length {args.block_length}: {args.model} has blocks of {block} "
            "tokens; leave the option out"
        )
    if args.block_length is None and not learner.shift:
        args.block_length = block or BLOCK_LENGTH
    return self_made.read(args, learner)


RECIPE = Recipe(
    name="certainty",
    summary="be sure early, for parallel decoding by `entropy` (dParallel)",
    paper="dParallel, arXiv 2509.26488",
    forwards=2,
    corrupt=_corrupt,
    step_loss=_step_loss,
    read=_read,
    begin_step=self_made.begin_step,
    decoding=entropy_decoding,
    settings=entropy_settings,
    # Where several answers are right, tokens depend on each other.
    tasks=FREE_TASKS,
    add_arguments=_add_arguments,
    defaults={"learning_rate": 1e-4, "num_rows": 5000},
)
add_arguments = RECIPE.add_options
run = RECIPE.run
