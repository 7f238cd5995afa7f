# SPDX-License-Identifier: Apache-2.0
"""What a step needs to know of each row of logits by classes of tokens.

A pattern that a text must match sorts the tokens into some hundred classes of tokens
that do the same (`constraints/automaton.py`). Of each row and class, the five numbers
that `token_stats.py` keeps of a row are kept here, in one pass over the row; or the
best token with the noise of `draw.py`. They merge over the ranks of tensor parallelism
as those of rows do.

The tokens' columns are read class after class, so that loops over a class are loops
over neighbours. Three versions: numba on a CPU, Triton on a GPU, and plain torch, which
the others are tested against and which serves elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_dlm.kernels import numba_rows
from vllm_dlm.kernels.draw import row_key, token_noise
from vllm_dlm.kernels.shards import VocabShard, best_of
from vllm_dlm.kernels.token_stats import merged, row_parts, triton_kernels

PIECE = 1024
"""Most tokens of a class that a GPU's program looks at, a power of two."""


@dataclass(frozen=True)
class TokenClasses:
    """The tokens of K classes, or those of one rank's part of the vocabulary; L of
    them, class after class, ascending in each."""

    columns: torch.Tensor
    """[L] int32: of this rank's logits."""
    tokens: torch.Tensor
    """[L] int32: their ids."""
    first: torch.Tensor
    """[K + 1] int64: where each class begins."""
    first_np: np.ndarray
    """The same on the host."""
    pieces: torch.Tensor
    """[P, 2] int64: begin and end of pieces of the L tokens, none of two classes."""
    first_piece: torch.Tensor
    """[K + 1] int64: the first piece of each class."""
    class_of: torch.Tensor
    """[V] int64, of the whole vocabulary: each token's class; K for none."""

    @classmethod
    def of(
        cls,
        class_of: np.ndarray,
        num_classes: int,
        device: torch.device,
        shard: VocabShard | None = None,
    ) -> TokenClasses:
        """Sort the tokens.

        Args:
            class_of: [V] integers; -1 for a token of no class.
            shard: which part of the vocabulary this rank has.
        """
        first_id, size = (
            (0, len(class_of)) if shard is None else (shard.first, shard.size)
        )
        own = class_of[first_id : first_id + size]
        order = np.argsort(own, kind="stable").astype(np.int32)
        order = order[(own < 0).sum() :]
        first = np.searchsorted(own[order], np.arange(num_classes + 1))
        counts = -(-np.diff(first) // PIECE)
        first_piece = np.concatenate([[0], np.cumsum(counts)])
        nth = np.arange(first_piece[-1]) - np.repeat(first_piece[:-1], counts)
        begins = np.repeat(first[:-1], counts) + nth * PIECE
        ends = np.minimum(begins + PIECE, np.repeat(first[1:], counts))
        return cls(
            torch.from_numpy(order).to(device),
            torch.from_numpy(order + np.int32(first_id)).to(device),
            torch.from_numpy(first.astype(np.int64)).to(device),
            first,
            torch.from_numpy(np.stack([begins, ends], axis=1)).to(device),
            torch.from_numpy(first_piece).to(device),
            torch.from_numpy(np.where(class_of < 0, num_classes, class_of))
            .long()
            .to(device),
        )

    def __len__(self) -> int:
        """K."""
        return len(self.first_np) - 1


def class_stats(
    logits: torch.Tensor,
    classes: TokenClasses,
    scale: float = 1.0,
    shard: VocabShard | None = None,
) -> torch.Tensor:
    """Numbers of each row and class; those of a row never depend on other rows.

    Args:
        logits: [N, V], floating point, or this rank's part. NaN counts as -inf.
        classes: of the same part of the vocabulary.
        scale: factor of all logits, one over the temperature.
        shard: which part it is; all ranks get the numbers of the whole rows.

    Returns:
        [N, K, 5] float64: the largest logit, its token (the lowest id on ties), sum of
        exp(d), sum of d exp(d), second-largest logit, for d = logit - largest. Without
        any token above -inf, sums are 0.
    """
    parts = _parts(logits, classes, scale)
    if shard is None:
        return parts
    shape = parts.shape
    return merged(shard.gather(parts.reshape(-1, shape[-1]))).reshape(shape)


def class_draws(
    logits: torch.Tensor,
    classes: TokenClasses,
    top: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    step: torch.Tensor,
    shard: VocabShard | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The token of each row and class that `draw` would draw of that class's tokens.

    Args:
        logits, classes, shard: as in `class_stats`.
        top: [N]: the row's largest logit, or any finite number: what scores are
            relative to.
        temperature: [N], above 0.
        seed, position, step: [N] int64, as `draw` takes them: the noise is the same.

    Returns:
        [N, K] float64 noisy scores, -inf where nothing can be drawn; [N, K] int64
        tokens; [N, K] float64, their logits.
    """
    key = row_key(seed, position, step)
    settings = top.float(), temperature.float(), key
    triton_rows = triton_kernels(logits)
    lists = classes.columns, classes.tokens, classes.first
    shape = len(logits), len(classes)
    if not len(classes.columns):
        scores = torch.full(shape, -torch.inf, device=logits.device)
        tokens = torch.zeros(shape, dtype=torch.int64, device=logits.device)
        own = scores.double()
    else:
        if triton_rows is not None:
            scores, places = triton_rows.class_draws(
                logits,
                *lists[:2],
                classes.pieces,
                classes.first_piece,
                PIECE,
                *settings,
            )
        elif _has_loops(logits):
            scores, places = numba_rows.class_draws(logits, *lists, *settings)
        else:
            scores, places = _draws_reference(logits, classes, *settings)
        # Of a class without tokens, whatever token there is.
        places = places.clamp(max=len(classes.columns) - 1)
        tokens = classes.tokens[places].long()
        own = logits.gather(1, classes.columns[places].long()).double()
    scores = scores.double()
    if shard is None:
        return scores, tokens, own
    numbers = torch.stack([scores, tokens.double(), own], dim=2)
    score, token, logit = shard.gather(numbers.reshape(-1, 3)).unbind(dim=2)
    best = best_of(score, token)
    is_best = token == best
    logit = torch.where(is_best, logit, -torch.inf).amax(dim=0)
    return (
        score.amax(dim=0).view_as(scores),
        best.long().view_as(scores),
        logit.view_as(scores),
    )


def _has_loops(logits: torch.Tensor) -> bool:
    is_cpu = logits.device.type == "cpu" and numba_rows.AVAILABLE
    return is_cpu and numba_rows.reads(logits)


def _parts(logits: torch.Tensor, classes: TokenClasses, scale: float) -> torch.Tensor:
    """`class_stats` of this rank's columns."""
    if not len(logits) or not len(classes.columns):
        return row_parts(
            logits.new_zeros(len(logits) * len(classes), 0),
            torch.empty(0, dtype=torch.int64),
        ).reshape(len(logits), len(classes), -1)
    lists = classes.columns, classes.tokens, classes.first
    triton_rows = triton_kernels(logits)
    if triton_rows is not None:
        parts: torch.Tensor = triton_rows.class_parts(
            logits, *lists[:2], classes.pieces, classes.first_piece, PIECE, scale
        )
        return parts
    if _has_loops(logits):
        return numba_rows.class_parts(logits, *lists, scale)
    return class_stats_reference(logits, classes, scale)


def class_stats_reference(
    logits: torch.Tensor, classes: TokenClasses, scale: float = 1.0
) -> torch.Tensor:
    """`class_stats` in plain torch, class by class, without ranks."""
    found = []
    for k in range(len(classes)):
        part = slice(int(classes.first_np[k]), int(classes.first_np[k + 1]))
        own = logits[:, classes.columns[part].long()].float() * scale
        bans = torch.full((len(logits),), -1, device=logits.device)
        numbers = row_parts(own.contiguous(), bans)
        token = numbers[:, 1]
        ids = classes.tokens[part].double()
        if len(ids):
            known = token.isfinite()
            token = torch.where(known, ids[torch.where(known, token, 0).long()], token)
        found.append(torch.cat([numbers[:, :1], token[:, None], numbers[:, 2:]], dim=1))
    return torch.stack(found, dim=1)


def _draws_reference(
    logits: torch.Tensor,
    classes: TokenClasses,
    top: torch.Tensor,
    temperature: torch.Tensor,
    key: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`numba_rows.class_draws` in plain torch."""
    own = logits[:, classes.columns.long()].float()
    own = own.masked_fill(own.isnan(), -torch.inf)
    noisy = (own - top[:, None]) / temperature[:, None]
    noisy = noisy + token_noise(key, classes.tokens.long())
    scores = noisy.new_full((len(logits), len(classes)), -torch.inf)
    places = torch.zeros(scores.shape, dtype=torch.int64, device=logits.device)
    for k in range(len(classes)):
        begin, end = int(classes.first_np[k]), int(classes.first_np[k + 1])
        if begin < end:
            scores[:, k], places[:, k] = noisy[:, begin:end].max(dim=1)
        places[:, k] += begin
    return scores, places
