# SPDX-License-Identifier: Apache-2.0
"""Longer blocks for a block-causal model: `vllm-dlm train block-size`.

A model in SDAR's layout is trained with blocks of one length, then of twice that
length from those weights, and so on: TDAR's progressive extension. The objective is
SDAR's (arXiv 2510.06303): a masked stream beside a clean one (`training.streams`), a
rate of masks p for each row, and the cross-entropy at the masks divided by p. dFactory,
which trains LLaDA2, draws p from 0.3 to 0.8 and takes the plain mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_dlm.cli.arguments import count
from vllm_dlm.training.recipes.command import Recipe, Setting, Training
from vllm_dlm.training.rows import Batch, Row

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.learner import Learner
    from vllm_dlm.training.streams import Streams

OBJECTIVES = ("sdar", "dfactory")
LEAST_RATE = 1e-3
DFACTORY_RATES = (0.3, 0.8)
# A row without a mask is drawn again, so often; then one token is masked.
TRIES = 10


def corrupt(
    batch: Batch,
    block_length: int,
    *,
    mask_id: int,
    end_id: int,
    generator: torch.Generator,
    objective: str = "sdar",
) -> Streams:
    """The two streams of a batch, with masks on what is answered.

    A row ends with the block that holds its response's end token: what is behind that
    block is never decoded. The masked stream holds the blocks from the one in which the
    response begins, and the clean stream those before the row's last block: nobody
    sees the others.

    Args:
        batch: The rows.
        block_length: Tokens per block.
        mask_id: Token id of the mask.
        end_id: Token id that ends a response and fills its last block.
        generator: Where rates and masks are drawn from.
        objective: One of `OBJECTIVES`. "sdar": rates from 0.001 to 1, a masked token of
            row r counts 1 / (p_r N), N tokens that may be masked in all rows.
            "dfactory": rates from 0.3 to 0.8, all masked tokens count alike.
    """
    import torch

    from vllm_dlm.training.streams import CLEAN, NO_TEXT, Streams

    num_rows, given = batch.ids.shape
    starts = batch.prompt_lengths[:, None]
    is_end = batch.response & (batch.ids == end_id)
    last = torch.where(is_end.any(1), is_end.int().argmax(1), batch.valid.sum(1) - 1)[
        :, None
    ]
    ends = (last // block_length + 1) * block_length
    firsts = starts // block_length * block_length
    width = int((ends - firsts).max())
    clean_length = int(ends.max()) - block_length

    places = torch.arange(width) + firsts
    ids = batch.ids.gather(1, places.clamp(max=given - 1))
    ids = torch.where(places > last, end_id, ids)
    maskable = (places >= starts) & (places < ends)
    rate, masked = _draw(maskable, generator, objective)
    if objective == "sdar":
        weights = masked / (rate * maskable.sum())
    else:
        weights = masked / masked.sum()

    clean_places = torch.arange(clean_length).expand(num_rows, -1)

    def both(clean: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.cat([clean, other], dim=1)

    clean_ids = batch.ids[:, :clean_length]
    positions = both(clean_places, places)
    return Streams(
        inputs=both(clean_ids, ids.masked_fill(masked, mask_id)),
        targets=both(clean_ids, ids),
        weights=both(torch.zeros(clean_places.shape), weights),
        positions=positions,
        texts=torch.where(positions < ends, 0, NO_TEXT),
        copies=both(torch.full_like(clean_places, CLEAN), torch.zeros_like(places)),
    )


def _draw(
    maskable: torch.Tensor, generator: torch.Generator, objective: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rates [R, 1] and masks [R, W]; at least one mask in each row."""
    import torch

    low, high = DFACTORY_RATES if objective == "dfactory" else (LEAST_RATE, 1.0)
    num_rows = len(maskable)
    rate = torch.zeros((num_rows, 1))
    masked = torch.zeros_like(maskable)
    for _ in range(TRIES):
        without = ~masked.any(1, keepdim=True)
        drawn = low + (high - low) * torch.rand((num_rows, 1), generator=generator)
        noise = torch.rand(maskable.shape, generator=generator)
        rate = torch.where(without, drawn, rate)
        masked = torch.where(without, (noise < drawn) & maskable, masked)
    without = ~masked.any(1, keepdim=True)
    chosen = torch.rand(maskable.shape, generator=generator).masked_fill(~maskable, -1)
    one = torch.zeros_like(maskable).scatter_(1, chosen.argmax(1, keepdim=True), True)
    return rate, masked | (one & without)


def loss(learner: Learner, streams: Streams, block_length: int) -> torch.Tensor:
    """Weighted sum of the cross-entropy at the masks, a scalar."""
    import torch.nn.functional as F

    where = streams.weights > 0
    logits = learner.logits_at(
        streams.inputs,
        None,
        where,
        seen=streams.seen(block_length),
        positions=streams.positions,
    )
    losses = F.cross_entropy(logits, streams.targets[where], reduction="none")
    return (losses * streams.weights[where]).sum()


def block_lengths(first: int, last: int) -> list[int]:
    """The length of each stage's blocks: doubled from `first` to `last`.

    Raises:
        ValueError: no doubling leads there.
    """
    lengths = [first]
    while lengths[-1] < last:
        lengths.append(2 * lengths[-1])
    if lengths[-1] != last:
        raise ValueError(
            f"--to {last}: blocks grow from --from {first} by doubling; the lengths "
            f"nearest to it are {', '.join(map(str, lengths[-2:]))}"
        )
    return lengths


def stage_length(training: Training, step: int) -> int:
    """Tokens per block in a step; all stages have equally many steps."""
    lengths: list[int] = training.args.stages
    return lengths[step * len(lengths) // training.steps]


def _read(args: argparse.Namespace, learner: Learner) -> Sequence[Row]:
    """The rows, after the stages are known: the learner ends with the last length."""
    own = learner.attention_block
    if own is None:
        raise ValueError(
            f"{args.model} has full attention; block-size trains block-causal models "
            "(SDAR's layout: model_type sdar)"
        )
    args.stages = block_lengths(args.first_block or 2 * own, args.last_block)
    learner.attention_block = args.last_block
    return Recipe.read(args, learner)


def _corrupt(
    training: Training, batch: Batch, generator: torch.Generator, step: int
) -> Streams:
    return corrupt(
        batch,
        stage_length(training, step),
        mask_id=training.learner.mask_id,
        end_id=training.learner.end_id,
        generator=generator,
        objective=training.args.objective,
    )


def _loss(training: Training, streams: Streams, step: int) -> torch.Tensor:
    return loss(training.learner, streams, stage_length(training, step))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="first_block",
        type=count,
        metavar="B",
        help="tokens of a block in the first stage; by default twice the model's own",
    )
    parser.add_argument(
        "--to",
        dest="last_block",
        type=count,
        metavar="B",
        required=True,
        help="tokens of a block in the last stage, and of the trained model; each "
        "stage has twice the tokens of the one before, and equally many steps",
    )
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="sdar",
        help="sdar: rates of masks from 0.001 to 1, a mask counts 1 / rate; dfactory: "
        "rates from 0.3 to 0.8, all masks count alike",
    )


RECIPE = Recipe(
    name="block-size",
    summary="a block-causal model for longer blocks (TDAR's extension of SDAR)",
    paper="SDAR, arXiv 2510.06303; TDAR",
    forwards=2,  # each row twice, noisy and clean
    corrupt=_corrupt,
    step_loss=_loss,
    read=_read,
    settings=lambda args: (
        Setting("static, 1 token per step", {"strategy": "static"}),
        Setting("threshold 0.9", {"strategy": "threshold"}),
    ),
    add_arguments=_add_arguments,
    defaults={"warmup": 0.03},
)
add_arguments = RECIPE.add_options
run = RECIPE.run
