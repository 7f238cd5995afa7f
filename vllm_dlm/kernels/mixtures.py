# SPDX-License-Identifier: Apache-2.0
"""Mixtures of all tokens' embeddings, by the probabilities of rows of logits.

Of a tile of logits [N, V] the probabilities exist once more, in the type of the
embeddings; in float32 only of a slice of rows at a time.
"""

from __future__ import annotations

from typing import Protocol

import torch

from vllm_dlm.kernels.shards import VocabShard
from vllm_dlm.kernels.token_stats import row_slices


class Mixer(Protocol):
    """The model's embeddings."""

    def mixed(self, probabilities: torch.Tensor) -> torch.Tensor:
        """[N, H]: embeddings of the tokens, mixed by this rank's part of their
        probabilities [N, V]; of all ranks together."""


def mixtures(
    logits: torch.Tensor,
    mixer: Mixer,
    shard: VocabShard | None = None,
    logsumexp: torch.Tensor | None = None,
) -> torch.Tensor:
    """[N, H]: of each row, the sum over tokens of probability times embedding.

    The mask id is a token as others. A row with NaN among its logits, or without a
    finite one, is NaN.

    Args:
        logits: [N, V], in the type of the embeddings; of this rank.
        shard: which part of the vocabulary the columns are; None if they are all of it.
        logsumexp: [N] of whole rows, all tokens counted, where it is known.
    """
    columns = logits if shard is None else shard.columns(logits)
    if logsumexp is None:
        logsumexp = _logsumexp(columns, shard)
    logsumexp = logsumexp.float()
    probabilities = torch.empty_like(columns, memory_format=torch.contiguous_format)
    for rows in row_slices(columns):
        scores = columns[rows].float() - logsumexp[rows, None]
        probabilities[rows] = scores.exp_()
    return mixer.mixed(probabilities)


def _logsumexp(columns: torch.Tensor, shard: VocabShard | None) -> torch.Tensor:
    """[N] float64 of whole rows, from each rank's largest logit and sum."""
    parts = columns.new_empty((len(columns), 2), dtype=torch.float64)
    for rows in row_slices(columns):
        scores = columns[rows].float()
        if scores.shape[1] == 0:
            # A rank that holds padding alone.
            parts[rows, 0], parts[rows, 1] = -torch.inf, 0.0
            continue
        top = scores.amax(dim=1)
        parts[rows, 0] = top.double()
        parts[rows, 1] = (scores - top[:, None]).exp_().sum(dim=1).double()
    ranks = parts[None] if shard is None else shard.gather(parts)
    top, total = ranks.unbind(dim=2)
    best = top.amax(dim=0)
    weight = torch.where(total > 0, (top - best).exp(), torch.zeros_like(top))
    # NaN stays NaN: 0 * NaN is.
    return best + (weight * total).sum(dim=0).log()
