# SPDX-License-Identifier: Apache-2.0
"""What certainty forcing and its relatives share: rows that are masked in two ways,
how sure the model is where it is right, and the options of both.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_dlm.training.recipes import self_made
from vllm_dlm.training.recipes.command import Setting
from vllm_dlm.training.rows import Batch

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.learner import Learner

TEMPERATURE = 0.5


@dataclass(frozen=True)
class Example:
    """Rows of a step, each masked in two ways.

    Args:
        ids: Clean token ids [R, L].
        inputs: What the network sees [R, 2, L].
        targets: Bool [R, 2, L], the masks whose tokens are learnt; none of the
            masks to the right of the active block is.
        valid: Bool [R, L], False behind a row's canvas.
        weights: Of each token in the means of its row [R, L].
    """

    ids: torch.Tensor
    inputs: torch.Tensor
    targets: torch.Tensor
    valid: torch.Tensor
    weights: torch.Tensor


def entropy(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Entropies [...] of softmax(logits / temperature), in nats."""
    log_probabilities = (logits.float() / temperature).log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def row_means(
    values: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Weighted means of each row's values [num_rows]; 0 for a row that has none.

    Args:
        values: [N].
        weights: [N].
        rows: The row of each value [N].
        num_rows: How many rows there are.
    """
    zeros = values.new_zeros(num_rows)
    sums = zeros.index_add(0, rows, values * weights)
    totals = zeros.index_add(0, rows, weights)
    return sums / totals.masked_fill(totals == 0, 1.0)


def terms(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    rows: torch.Tensor,
    num_rows: int,
    *,
    temperature: float = TEMPERATURE,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each row, and its entropy where the model is right.

    Args:
        logits: Of the masked positions [N, V].
        tokens: The true ones [N].
        rows: Which row each belongs to [N]; the two ways to mask are two rows.
        num_rows: How many rows there are.
        temperature: Of the distribution whose entropy is taken.
        weights: Of each position in its row's means [N]; 1 by default.

    Returns:
        Both [num_rows], 0 for a row without a position.
    """
    import torch
    import torch.nn.functional as F

    if weights is None:
        weights = torch.ones(len(tokens), device=logits.device)
    logits = logits.float()
    right = logits.argmax(-1) == tokens
    missed = F.cross_entropy(logits, tokens, reduction="none")
    unsure = entropy(logits, temperature)
    return (
        row_means(missed, weights, rows, num_rows),
        row_means(unsure, weights * right, rows, num_rows),
    )


def forward(
    learner: Learner, example: Example, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`terms` of both ways to mask, [R, 2] each, from one forward of twice the rows."""
    targets = example.targets.flatten(0, 1)
    ids, valid, weights = (
        tensor.repeat_interleave(2, 0)
        for tensor in (example.ids, example.valid, example.weights)
    )
    # A row whose block is all masks has no target in its second way.
    some = targets.any(1)
    inputs = example.inputs.flatten(0, 1)
    logits = learner.logits_at(inputs[some], valid[some], targets[some])
    missed, unsure = terms(
        logits,
        ids[targets],
        targets.nonzero()[:, 0],
        len(ids),
        temperature=temperature,
        weights=weights[targets],
    )
    return missed.view(-1, 2), unsure.view(-1, 2)


def padding_weights(batch: Batch, end_id: int, weight: float) -> torch.Tensor:
    """Weights [R, L]: 1 to a text's own end, `weight` behind it."""
    import torch

    ends = (batch.ids == end_id) & batch.response
    return torch.where(ends & (ends.int().cumsum(1) > 1), weight, 1.0)


def entropy_settings(args: argparse.Namespace) -> Sequence[Setting]:
    """The curve that shows whether certainty has cost accuracy."""
    entropies = sorted({0.05, 0.1, 0.2, 0.5, args.threshold})
    return (
        *(
            Setting(
                f"entropy {value:g}",
                {"strategy": "entropy", "strategy_config": {"threshold": value}},
            )
            for value in entropies
        ),
        *(
            Setting(
                f"threshold {value:g}",
                {"strategy": "threshold", "strategy_config": {"threshold": value}},
            )
            for value in (0.9, 0.95)
        ),
        Setting(
            "static, 4 tokens per step", {"strategy": "static", "steps_per_block": 8}
        ),
    )


def entropy_decoding(args: argparse.Namespace) -> Mapping[str, Any]:
    """How the trained model is served: by `entropy`."""
    return {"strategy": "entropy", "strategy_config": {"threshold": args.threshold}}


def add_certainty_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of everything that lowers an entropy."""
    self_made.add_arguments(parser)
    parser.add_argument(
        "--certainty-temperature",
        type=float,
        default=TEMPERATURE,
        metavar="T",
        help="temperature of the distribution whose entropy is lowered (%(default)s)",
    )
    parser.add_argument(
        "--padding-weight",
        type=float,
        default=1.0,
        metavar="W",
        help="weight of the end tokens behind a text's own in the means; below 1 they "
        "do not drown short answers (published: %(default)s)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="largest entropy at which a token is written afterwards (%(default)s)",
    )


def check_certainty_arguments(args: argparse.Namespace) -> None:
    """Refuse those of `add_certainty_arguments` that are out of their range."""
    check_range(args, "padding_weight", 0)
    check_range(args, "certainty_temperature", 1e-3)
    check_range(args, "threshold", 0, 100)


def check_full_attention(
    args: argparse.Namespace, learner: Learner, recipe: str
) -> None:
    """Refuse a block-causal model, where masks may not stand left of the block.

    Raises:
        ValueError: it is one.
    """
    if learner.attention_block is not None:
        raise ValueError(
            f"{recipe} masks a canvas all over, and {args.model} is block-causal: of "
            "what is left of a block it knows finished text alone; `certainty` is for "
            "such models too"
        )


def check_range(
    args: argparse.Namespace, name: str, least: float, most: float = math.inf
) -> None:
    """Refuse an option that is out of its range.

    Raises:
        ValueError: it is.
    """
    value = getattr(args, name)
    if value is None or least <= value <= most:
        return
    option = f"--{name.replace('_', '-')}"
    until = "" if math.isinf(most) else f" and at most {most:g}"
    raise ValueError(f"{option} is at least {least:g}{until}, not {value:g}")
