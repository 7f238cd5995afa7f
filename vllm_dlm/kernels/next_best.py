# SPDX-License-Identifier: Apache-2.0
"""The best token of a row but for some: a second look at rows that few strategies need.

Logits are copied as float32, some rows at a time, the tokens that do not count are left
out, and the copy is measured as any logits are (`token_stats.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_dlm.kernels.shards import VocabShard
from vllm_dlm.kernels.token_stats import row_slices, token_stats


def next_best(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    besides: Sequence[int] = (),
    banned: torch.Tensor | None = None,
    ban_id: int = -1,
    shard: VocabShard | None = None,
) -> torch.Tensor:
    """[N] int64: the best token of each row, the lowest id on ties.

    Where nothing else is above -inf, it is the row's own of `tokens`.

    Args:
        logits: [N, V], or this rank's part of them.
        tokens: [N] int64: left out of its row, each.
        besides: token ids that are left out of all rows.
        banned, ban_id, shard: as `token_stats` takes them.
    """
    first = 0 if shard is None else shard.first
    size = logits.shape[1] if shard is None else shard.size
    found = []
    for part in row_slices(logits):
        scores = logits[part].to(torch.float32, copy=True)
        if size:
            for token in besides:
                if 0 <= token - first < size:
                    scores[:, token - first] = -torch.inf
            column = (tokens[part] - first)[:, None]
            is_here = (column >= 0) & (column < size)
            column = torch.where(is_here, column, 0)
            kept = scores.gather(1, column)
            scores.scatter_(1, column, torch.where(is_here, -torch.inf, kept))
        stats = token_stats(
            scores,
            banned=None if banned is None else banned[part],
            ban_id=ban_id,
            shard=shard,
        )
        nothing = stats.logsumexp == -torch.inf
        found.append(torch.where(nothing, tokens[part], stats.argmax))
    return torch.cat(found) if found else tokens.clone()
