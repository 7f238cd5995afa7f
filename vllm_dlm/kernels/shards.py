# SPDX-License-Identifier: Apache-2.0
"""Rows whose vocabulary is cut over ranks: small gathers of [N] numbers, never logits.

Each rank of a tensor-parallel group holds the logits of a range of token ids. It
measures its own columns, and a few float64 numbers per row are gathered and merged:
the merge is a plain function of what all ranks sent, so all ranks get the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class VocabShard:
    """One rank's part of the vocabulary: the first `size` columns of its logits.

    Further columns are padding (vLLM pads the vocabulary) and count for nothing.
    """

    first: int
    """Id of the token of column 0."""
    size: int
    """Tokens of this rank; may be 0 on ranks that hold padding alone."""
    gather: Callable[[torch.Tensor], torch.Tensor]
    """[N, K] float64 of this rank -> [T, N, K] of all T ranks, in the same order on
    each. All ranks call it equally often."""

    def __post_init__(self) -> None:
        if self.first < 0 or self.size < 0:
            raise ValueError(
                "a vocabulary shard needs first >= 0 and size >= 0, not "
                f"first={self.first}, size={self.size}"
            )

    def columns(self, logits: torch.Tensor) -> torch.Tensor:
        """[N, size] view of logits [N, >= size] without the padding."""
        if logits.shape[1] < self.size:
            raise ValueError(
                f"the shard has size={self.size} tokens, its logits only "
                f"{logits.shape[1]} columns"
            )
        return logits[:, : self.size]

    def column(self, token: int) -> int:
        """The column of a token id; -1 where another rank has it."""
        column = token - self.first
        return column if 0 <= column < self.size else -1


def logit_of(
    logits: torch.Tensor, tokens: torch.Tensor, shard: VocabShard | None = None
) -> torch.Tensor:
    """[N] float64: the logit of one token id [N] in each row of [N, V] logits."""
    if shard is None:
        return logits.gather(1, tokens[:, None])[:, 0].double()
    columns = tokens - shard.first
    mine = (columns >= 0) & (columns < shard.size)
    if shard.size == 0:
        found = torch.full(
            tokens.shape, -torch.inf, dtype=torch.float64, device=logits.device
        )
    else:
        found = logits.gather(1, torch.where(mine, columns, 0)[:, None])[:, 0].double()
    # NaN counts as -inf; a maximum over ranks would spread it.
    found = torch.where(mine & ~found.isnan(), found, -torch.inf)
    return shard.gather(found[:, None])[..., 0].amax(dim=0)


def best_of(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The token of the highest score along dimension 0, the lowest id on ties.

    Args:
        scores: [T, N], no NaN.
        tokens: [T, N].

    Returns:
        [N], of the dtype of `tokens`.
    """
    behind = tokens.amax(dim=0)
    return torch.where(scores == scores.amax(dim=0), tokens, behind).amin(dim=0)
