# SPDX-License-Identifier: Apache-2.0
"""Training a model to correct what it has written: `vllm-dlm train t2t`.

Token to token editing, for the strategy `joint`. LLaDA2.1 (arXiv 2602.08676) trains on
two streams: canvases with masks, and canvases in which some tokens are replaced by
others. The report prints no rates; the defaults here are ours. So is `kept_weight`: a
network that only ever learns from wrong tokens learns that a token is wrong.

With `on_policy` the wrong tokens are the model's own (DMax's uniform training, of its
code): every row comes twice with the same masks, and in the second copy all masks hold
what the model itself would write there, all at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_dlm.tasks.problems import FREE_TASKS
from vllm_dlm.training.recipes.command import Recipe, Setting, Training
from vllm_dlm.training.rows import Batch

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.learner import Learner

LEAST_RATE = 1e-3
ON_POLICY_RATE = 0.75


@dataclass(frozen=True)
class Edits:
    """A batch with masks and wrong tokens, in C copies.

    Args:
        ids: Clean token ids [R, L].
        inputs: What the network sees [R, C, L].
        valid: Bool [R, L], as of `Batch`.
        weights: What a token's cross-entropy counts [R, C, L]; all of them sum to 1.
        written: Bool [R, C, L], the masks of `inputs` that the model fills itself
            before it learns.
    """

    ids: torch.Tensor
    inputs: torch.Tensor
    valid: torch.Tensor
    weights: torch.Tensor
    written: torch.Tensor


def other_tokens(
    ids: torch.Tensor, num_ids: int, mask_id: int, generator: torch.Generator
) -> torch.Tensor:
    """For each token another one, drawn evenly from all but itself and the mask.

    Args:
        ids: Token ids of any shape, none of them the mask.
        num_ids: Size of the vocabulary, at least 3.
        mask_id: Token id of the mask.
        generator: Where they are drawn from.
    """
    import torch

    drawn = torch.randint(num_ids - 2, ids.shape, generator=generator)
    # Step over the two that may not be, the smaller one first.
    drawn += drawn >= ids.clamp(max=mask_id)
    drawn += drawn >= ids.clamp(min=mask_id)
    return drawn


def corrupt(
    batch: Batch,
    mask_id: int,
    num_ids: int,
    generator: torch.Generator,
    *,
    edit_share: float = 0.5,
    replace_rate: float = 0.15,
    mask_rate: float | None = None,
    kept_weight: float = 0.2,
) -> Edits:
    """Masks everywhere, and wrong tokens in a share of the rows; one copy of each row.

    A masked or a replaced token counts 1, the other tokens of the canvas of a row with
    replaced ones `kept_weight`; all are divided by their sum.

    Args:
        batch: The rows.
        mask_id: Token id of the mask.
        num_ids: Size of the vocabulary that wrong tokens are drawn from.
        generator: Where masks and tokens are drawn from.
        edit_share: Share of the rows with replaced tokens.
        replace_rate: Share of such a row's tokens that are replaced, of those that
            are not masked.
        mask_rate: Share of a canvas that is masked; None draws one for each row, evenly
            from 0.001 to 1.
        kept_weight: See above.
    """
    import torch

    num_rows = len(batch.ids)
    masked = _masks(batch, mask_rate, generator)
    edited = torch.rand((num_rows, 1), generator=generator) < edit_share
    replaced = torch.rand(batch.ids.shape, generator=generator) < replace_rate
    replaced &= edited & batch.response & ~masked
    others = other_tokens(batch.ids, num_ids, mask_id, generator)
    inputs = batch.ids.masked_fill(masked, mask_id).where(~replaced, others)
    kept = edited & batch.response & ~masked & ~replaced
    weights = (masked | replaced) + kept_weight * kept
    return Edits(
        batch.ids,
        inputs[:, None],
        batch.valid,
        (weights / weights.sum().clamp(min=1e-9))[:, None],
        torch.zeros_like(masked)[:, None],
    )


def corrupt_on_policy(
    batch: Batch,
    mask_id: int,
    generator: torch.Generator,
    *,
    mask_rate: float | None = ON_POLICY_RATE,
) -> Edits:
    """Two copies of each row with the same masks, which `fill` fills in the second.

    Every masked token counts alike, in both copies.

    Args:
        batch: The rows.
        mask_id: Token id of the mask.
        generator: Where masks are drawn from.
        mask_rate: As of `corrupt`.
    """
    import torch

    masked = _masks(batch, mask_rate, generator)
    inputs = batch.ids.masked_fill(masked, mask_id)
    weights = masked / (2 * masked.sum()).clamp(min=1)
    written = torch.stack((torch.zeros_like(masked), masked), dim=1)
    return Edits(
        batch.ids,
        torch.stack((inputs, inputs), dim=1),
        batch.valid,
        torch.stack((weights, weights), dim=1),
        written,
    )


def fill(learner: Learner, edits: Edits) -> torch.Tensor:
    """The inputs [R, C, L], with the model's best tokens where `written` says so.

    Dropout is off, nothing is drawn, no gradient is kept, and the mask is never
    written.
    """
    import torch

    rows = edits.written.any(2)
    inputs = edits.inputs.clone()
    if not rows.any():
        return inputs
    where = edits.written[rows]
    valid = edits.valid[:, None].expand_as(edits.written)[rows]
    network = learner.network
    was_training = network.training
    network.eval()
    with torch.no_grad():
        clean = edits.ids[:, None].expand_as(inputs)[rows]
        logits = _logits(learner, inputs[rows], clean, valid, where)
    network.train(was_training)
    logits[:, learner.mask_id] = -torch.inf
    inputs[edits.written] = logits.argmax(-1)
    return inputs


def loss(learner: Learner, edits: Edits) -> torch.Tensor:
    """Weighted sum of the cross-entropy of the true tokens, a scalar."""
    import torch.nn.functional as F

    inputs = fill(learner, edits)
    copies = inputs.shape[1]
    where = (edits.weights > 0).flatten(0, 1)
    valid = edits.valid.repeat_interleave(copies, dim=0)
    targets = edits.ids.repeat_interleave(copies, dim=0)
    logits = _logits(learner, inputs.flatten(0, 1), targets, valid, where)
    losses = F.cross_entropy(logits, targets[where], reduction="none")
    return (losses * edits.weights.flatten(0, 1)[where]).sum()


def _logits(
    learner: Learner,
    inputs: torch.Tensor,
    clean: torch.Tensor,
    valid: torch.Tensor,
    where: torch.Tensor,
) -> torch.Tensor:
    """As `Learner.logits_at`, with what a token sees while its block is decoded.

    With blocks the clean text stands behind the inputs, with the same positions; a
    token of the inputs sees its block there, and the clean blocks to the left.
    """
    import torch

    block = learner.attention_block
    if block is None:
        return learner.logits_at(inputs, valid, where)
    length = inputs.shape[1]
    places = torch.arange(length, device=inputs.device).repeat(2)
    is_clean = torch.arange(2 * length, device=inputs.device) >= length
    query, key = (places // block)[:, None], places // block
    left = (key < query) & is_clean
    own = (key == query) & (is_clean == is_clean[:, None])
    return learner.logits_at(
        torch.cat((inputs, clean), dim=1),
        torch.cat((valid, valid), dim=1),
        torch.cat((where, torch.zeros_like(where)), dim=1),
        seen=(left | own)[None],
        positions=places[None],
    )


def _masks(
    batch: Batch, mask_rate: float | None, generator: torch.Generator
) -> torch.Tensor:
    import torch

    rate = torch.full((len(batch.ids), 1), mask_rate or 0.0)
    if mask_rate is None:
        share = torch.rand((len(batch.ids), 1), generator=generator)
        rate = (1 - LEAST_RATE) * share + LEAST_RATE
    return (torch.rand(batch.ids.shape, generator=generator) < rate) & batch.response


def _corrupt(
    training: Training, batch: Batch, generator: torch.Generator, step: int
) -> Edits:
    del step
    args, mask_id = training.args, training.learner.mask_id
    if args.on_policy:
        rate = ON_POLICY_RATE if args.mask_rate is None else args.mask_rate
        return corrupt_on_policy(batch, mask_id, generator, mask_rate=rate)
    given = {name: getattr(args, name) for name in RANDOM_OPTIONS}
    return corrupt(
        batch,
        mask_id,
        len(training.learner.tokenizer),
        generator,
        mask_rate=args.mask_rate,
        **{name: value for name, value in given.items() if value is not None},
    )


def _loss(training: Training, edits: Edits, step: int) -> torch.Tensor:
    del step
    return loss(training.learner, edits)


def _decoding(args: argparse.Namespace) -> Mapping[str, Any]:
    return {
        "strategy": "joint",
        "strategy_config": {
            "mask_threshold": args.mask_threshold,
            "edit_threshold": args.edit_threshold,
        },
    }


def _share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def _rate(text: str) -> float:
    """A number above 0, to 1."""
    value = _share(text)
    if value == 0:
        raise argparse.ArgumentTypeError("it must be above 0")
    return value


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("wrong tokens")
    what.add_argument(
        "--mask-rate",
        type=_rate,
        metavar="P",
        help="share of a canvas that is masked; by default drawn for each row, and "
        f"{ON_POLICY_RATE} with --on-policy",
    )
    what.add_argument(
        "--edit-share",
        type=_share,
        metavar="SHARE",
        help="share of the rows in which tokens are replaced (0.5)",
    )
    what.add_argument(
        "--replace-rate",
        type=_rate,
        metavar="RATE",
        help="share of their tokens that are replaced, of those not masked (0.15)",
    )
    what.add_argument(
        "--kept-weight",
        type=_share,
        metavar="WEIGHT",
        help="what a right token of such a row counts; a wrong one counts 1 (0.2)",
    )
    what.add_argument(
        "--on-policy",
        action="store_true",
        help="learn from the model's own tokens in place of drawn ones: each row once "
        "with masks, and once with all of them filled at once",
    )
    decoding = parser.add_argument_group(
        "decoding", "the parameters of `joint` that the trained model has as defaults"
    )
    decoding.add_argument("--mask-threshold", type=_share, default=0.5, metavar="P")
    decoding.add_argument("--edit-threshold", type=_share, default=0.5, metavar="P")


RANDOM_OPTIONS = ("edit_share", "replace_rate", "kept_weight")
"""What is only for tokens that are drawn."""


RECIPE = Recipe(
    name="t2t",
    summary="correct tokens that are written (strategy joint; LLaDA2.1, DMax)",
    paper="LLaDA2.1, arXiv 2602.08676; on-policy: DMax",
    forwards=2,  # on-policy, each row twice
    corrupt=_corrupt,
    step_loss=_loss,
    decoding=_decoding,
    settings=lambda args: (
        Setting("joint", _decoding(args)),
        *(
            Setting(
                f"threshold {threshold}",
                {
                    "strategy": "threshold",
                    "strategy_config": {"threshold": threshold},
                },
            )
            for threshold in (0.5, 0.7, 0.9)
        ),
    ),
    add_arguments=_add_arguments,
    # Where several answers are right, what is written at once has to be edited.
    tasks=FREE_TASKS,
)
add_arguments = RECIPE.add_options


def run(args: argparse.Namespace) -> None:
    """Train as the options say, and export.

    Raises:
        ValueError: options that do not go together.
    """
    given = [name for name in RANDOM_OPTIONS if getattr(args, name) is not None]
    if args.on_policy and given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(
            "--on-policy learns from the model's own tokens, and draws none: leave "
            f"out {names}"
        )
    RECIPE.run(args)
