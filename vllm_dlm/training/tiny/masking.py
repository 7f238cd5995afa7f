# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a row a masked-diffusion model has to guess, and the loss of that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of one length.

    Args:
        ids: Token ids [rows, length].
        inputs: The same with masks at what has to be guessed.
        weights: Loss weights [rows, length], 0 where nothing is masked.
        valid: Bool [rows, length], False behind a shorter row's end; None if all
            rows are full.
    """

    ids: Tensor
    inputs: Tensor
    weights: Tensor
    valid: Tensor | None = None


def mask_canvas(
    ids: Tensor,
    in_canvas: Tensor,
    in_padding: Tensor,
    padding_weight: float | Tensor,
    mask_id: int,
    generator: torch.Generator,
) -> Batch:
    """Mask a random part of every row's canvas.

    Half of the rows have all their padding masked, as while decoding, where the
    blocks to the right are not begun; a tenth has the whole answer masked.

    Args:
        ids: Token ids [rows, length].
        in_canvas: Bool [rows, length], what may be masked.
        in_padding: Bool [rows, length], <|endoftext|> behind the answer.
        padding_weight: Loss weight there, broadcast to [rows, length].
        mask_id: Token id of the mask.
        generator: Where masks are drawn from.
    """
    num_rows = len(ids)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    answer_ratio = 0.02 + 0.98 * uniform(num_rows, 1)
    answer_ratio[uniform(num_rows, 1) < 0.1] = 1.0
    padding_ratio = uniform(num_rows, 1)
    padding_ratio[uniform(num_rows, 1) < 0.5] = 1.0
    ratio = torch.where(in_padding, padding_ratio, answer_ratio)
    masked = (uniform(*ids.shape) < ratio) & in_canvas
    weights = masked * torch.where(in_padding, padding_weight, 1.0)
    return Batch(ids, ids.masked_fill(masked, mask_id), weights)


def batch_loss(forward: Callable[..., Any], batches: Iterable[Batch]) -> Tensor:
    """Weighted mean of the cross-entropy at the masked tokens of all batches."""
    loss, total = torch.zeros(()), torch.zeros(())
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(batch.inputs, batch.valid)
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), batch.ids.flatten(), reduction="none"
        )
        loss = loss + (losses * batch.weights.flatten()).sum()
        total = total + batch.weights.sum()
    return loss / total
