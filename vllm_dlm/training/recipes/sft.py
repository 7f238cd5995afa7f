# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: `vllm-dlm train sft`, the objective of LLaDA itself.

LLaDA (arXiv 2502.09992): each row's canvas is masked at a rate of its own, and a
masked token counts 1 / rate, so that the loss bounds the text's likelihood.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_dlm.training.recipes.command import Recipe, Setting, Training
from vllm_dlm.training.rows import Batch

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.learner import Learner

LEAST_RATE = 1e-3


@dataclass(frozen=True)
class Masked:
    """A batch with masks.

    Args:
        ids: Clean token ids [R, L].
        inputs: The same with masks [R, L].
        valid: Bool [R, L], as of `Batch`.
        weights: What a masked token's cross-entropy counts [R, L]; 0 elsewhere.
    """

    ids: torch.Tensor
    inputs: torch.Tensor
    valid: torch.Tensor
    weights: torch.Tensor


def corrupt(batch: Batch, mask_id: int, generator: torch.Generator) -> Masked:
    """Mask each row's canvas at a rate p, drawn evenly from 0.001 to 1.

    The weights of row r's masked tokens are 1 / (p_r G_r R): R rows, G_r tokens of its
    canvas.
    """
    import torch

    num_rows = len(batch.ids)
    share = torch.rand((num_rows, 1), generator=generator)
    rate = (1 - LEAST_RATE) * share + LEAST_RATE
    masked = torch.rand(batch.ids.shape, generator=generator) < rate
    masked &= batch.response
    canvas = batch.response.sum(1, keepdim=True)
    weights = masked / (rate * canvas * num_rows)
    inputs = batch.ids.masked_fill(masked, mask_id)
    return Masked(batch.ids, inputs, batch.valid, weights)


def loss(learner: Learner, masked: Masked) -> torch.Tensor:
    """Weighted sum of the cross-entropy at the masked tokens, a scalar."""
    import torch.nn.functional as F

    where = masked.weights > 0
    logits = learner.logits_at(masked.inputs, masked.valid, where)
    losses = F.cross_entropy(logits, masked.ids[where], reduction="none")
    return (losses * masked.weights[where]).sum()


def _corrupt(
    training: Training, batch: Batch, generator: torch.Generator, step: int
) -> Masked:
    del step
    return corrupt(batch, training.learner.mask_id, generator)


def _loss(training: Training, masked: Masked, step: int) -> torch.Tensor:
    del step
    return loss(training.learner, masked)


RECIPE = Recipe(
    name="sft",
    summary="fine-tune on answers of your own (the objective of LLaDA)",
    paper="LLaDA, arXiv 2502.09992",
    corrupt=_corrupt,
    step_loss=_loss,
    settings=lambda args: (
        Setting("static, 1 token per step", {"strategy": "static"}),
        Setting("threshold 0.9", {"strategy": "threshold"}),
    ),
)
add_arguments = RECIPE.add_options
run = RECIPE.run
