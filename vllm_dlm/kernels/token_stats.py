# SPDX-License-Identifier: Apache-2.0
"""What a denoise step needs to know of each row of logits, in one pass over them.

Softmax, argmax, entropy and top-2 as separate torch calls read the vocabulary many
times and write float32 `[rows, vocab]` copies of it. Here each row is read once and
five float64 numbers of it are kept (`_PARTS`). Numbers of two parts of a row merge
into those of both: so rows are cut over a GPU's programs, and over the ranks of tensor
parallelism, which gather these numbers instead of logits (`shards.py`).

Three versions compute the five numbers: numba on a CPU (`numba_rows.py`), Triton on a
GPU (`triton_rows.py`, a file of its own because only machines with Triton can import
it), and plain torch, which the others are tested against and which serves elsewhere,
in slices of rows.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from vllm_dlm.kernels import numba_rows
from vllm_dlm.kernels.shards import VocabShard, best_of, logit_of

_SLICE_CPU = 1 << 20
_SLICE = 1 << 23
"""Logits per slice of rows where a copy is made: 32 MiB of float32, on a CPU 4."""
_PARTS = 5
"""Per row: the largest logit, its token, sum of exp(d), sum of d exp(d), second-largest
logit, for d = logit - largest. Without any token: -inf, inf, 0, 0, -inf."""


class TokenStats(NamedTuple):
    """Statistics of N rows of untempered logits; each tensor is [N].

    A row without a finite maximum (all banned or NaN, or an infinite logit) has
    confidence, margin and entropy 0 and logprob -inf, never NaN.
    """

    argmax: torch.Tensor
    """int64: most probable token, the lowest id on ties."""
    logprob: torch.Tensor
    """float32: its log-probability."""
    confidence: torch.Tensor
    """float32: its probability."""
    logsumexp: torch.Tensor
    """float64, for `prob_of`: float32 would cost `prob_of` its last digits."""
    entropy: torch.Tensor | None = None
    """float32, nats."""
    margin: torch.Tensor | None = None
    """float32: best minus second-best probability."""


def token_stats(
    logits: torch.Tensor,
    need_entropy: bool = False,
    need_margin: bool = False,
    banned: torch.Tensor | None = None,
    ban_id: int = -1,
    shard: VocabShard | None = None,
) -> TokenStats:
    """Statistics of each row; the result for a row never depends on other rows.

    Args:
        logits: [N, V], floating point. NaN counts as -inf.
        need_entropy, need_margin: whether to compute them (None otherwise).
        banned: [N] bool, the rows in which token `ban_id` is left out of everything.
            None bans it in all rows if `ban_id` >= 0.
        ban_id: token to leave out (the mask id); -1 for none.
        shard: which part of the vocabulary the columns are, under tensor parallelism;
            None if they are all of it. `ban_id` and the argmax are ids of the whole
            vocabulary, and all ranks get the statistics of the whole rows.
    """
    if shard is not None:
        columns = shard.columns(logits)
        parts = row_parts(columns, banned_ids(columns, banned, shard.column(ban_id)))
        parts[:, 1] += shard.first
        return finished(merged(shard.gather(parts)), need_entropy, need_margin)
    bans = banned_ids(logits, banned, ban_id)
    triton_rows = triton_kernels(logits)
    if triton_rows is not None:
        columns = triton_rows.token_stats(logits, bans, need_entropy, need_margin)
        return TokenStats(*columns)
    return finished(row_parts(logits, bans), need_entropy, need_margin)


def write_stats(
    logits: torch.Tensor,
    columns: Sequence[torch.Tensor],
    banned: torch.Tensor | None = None,
    ban_id: int = -1,
    shard: VocabShard | None = None,
) -> None:
    """As `token_stats`, all of them, to memory that is there.

    On a CPU no tensor operation is dispatched for it, but for `banned_ids`.

    Args:
        logits: [N, V], N at least 1.
        columns: [N] each: argmax, confidence, logsumexp, entropy, margin, in the types
            that `TokenStats` names.
    """
    loops = logits.device.type == "cpu" and numba_rows.AVAILABLE and shard is None
    if loops and logits.shape[1] and numba_rows.reads(logits):
        bans = banned_ids(logits, banned, ban_id)
        numba_rows.write_stats(logits, bans, *columns)
        return
    stats = token_stats(logits, True, True, banned, ban_id, shard)
    values = (
        stats.argmax,
        stats.confidence,
        stats.logsumexp,
        stats.entropy,
        stats.margin,
    )
    for column, value in zip(columns, values, strict=True):
        if value is not None:
            column.copy_(value)


def token_stats_reference(
    logits: torch.Tensor,
    need_entropy: bool = False,
    need_margin: bool = False,
    banned: torch.Tensor | None = None,
    ban_id: int = -1,
) -> TokenStats:
    """`token_stats` in plain torch, with float32 copies of all of `logits`."""
    bans = banned_ids(logits, banned, ban_id)
    return finished(_reference_parts(logits, bans), need_entropy, need_margin)


def prob_of(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    logsumexp: torch.Tensor,
    shard: VocabShard | None = None,
) -> torch.Tensor:
    """Untempered probability of a given token in each row.

    Args:
        logits: [N, V].
        tokens: [N] int64; must not be a banned token.
        logsumexp: [N], `TokenStats.logsumexp` of the same logits.
        shard: as in `token_stats`.

    Returns:
        [N] float32; 0 where the logit is NaN or the row has no finite maximum.
    """
    chosen = logit_of(logits, tokens, shard)
    return (chosen - logsumexp).exp().nan_to_num(nan=0.0, posinf=0.0).float()


def forbid(
    logits: torch.Tensor, banned: torch.Tensor | None, ban_id: int
) -> torch.Tensor:
    """A copy of [N, V] logits with NaN and, in `banned` rows, `ban_id` at -inf."""
    logits = logits.masked_fill(logits.isnan(), -torch.inf)
    if ban_id >= 0 and banned is None:
        logits[:, ban_id] = -torch.inf
    elif ban_id >= 0 and banned is not None:
        logits[:, ban_id] = logits[:, ban_id].masked_fill(banned, -torch.inf)
    return logits


def banned_ids(
    logits: torch.Tensor, banned: torch.Tensor | None, ban_id: int
) -> torch.Tensor:
    """[N] int64: the token that each row of [N, V] logits leaves out; -1 for none."""
    num_rows, vocab = logits.shape
    if ban_id >= vocab:
        raise ValueError(
            f"ban_id={ban_id} is no token of a vocabulary of {vocab}; "
            "give a token id, or -1 for none"
        )
    bans = torch.full((num_rows,), ban_id, dtype=torch.int64, device=logits.device)
    return bans if banned is None else torch.where(banned, bans, -1)


# --- The five numbers of a row -----------------------------------------------------


def merged(parts: torch.Tensor) -> torch.Tensor:
    """Five numbers of rows [N, 5] from those [T, N, 5] of T pieces of these rows."""
    best, token, total, spread, second = parts.unbind(dim=2)
    top = best.amax(dim=0)
    # -inf - -inf is nan, in pieces whose sums are 0; what is far below adds nothing.
    shift = (best - top).nan_to_num(nan=0.0).clamp(min=-1e4)
    weight = shift.exp()
    spread = weight * (spread + shift * total)
    total = weight * total
    return torch.stack(
        [
            top,
            best_of(best, token),
            # In the order of the pieces, whatever N is.
            functools.reduce(torch.add, total.unbind()),
            functools.reduce(torch.add, spread.unbind()),
            torch.cat([best, second]).topk(2, dim=0).values[1],
        ],
        dim=1,
    )


def finished(
    parts: torch.Tensor, need_entropy: bool = False, need_margin: bool = False
) -> TokenStats:
    """Statistics from the five numbers [N, 5] float64 of whole rows."""
    best, token, total, spread, second = parts.unbind(dim=1)
    usable = best.isfinite()
    log_total = total.log()
    entropy = margin = None
    if need_entropy:
        entropy = torch.where(usable, log_total - spread / total, 0.0).float()
    if need_margin:
        gap = 1.0 - (second - best).exp()
        margin = torch.where(usable, gap / total, 0.0).float()
    return TokenStats(
        token.masked_fill(token == torch.inf, 0.0).long(),
        torch.where(usable, -log_total, -torch.inf).float(),
        torch.where(usable, 1.0 / total, 0.0).float(),
        torch.where(usable, best + log_total, best),
        entropy,
        margin,
    )


def row_parts(logits: torch.Tensor, bans: torch.Tensor) -> torch.Tensor:
    """The five numbers [N, 5] of rows [N, V] that leave out tokens `bans` [N]."""
    num_rows, vocab = logits.shape
    if num_rows == 0 or vocab == 0:
        return _no_token(num_rows, logits.device)
    triton_rows = triton_kernels(logits)
    if triton_rows is not None:
        return triton_rows.row_parts(logits, bans)
    compute = _reference_parts
    if logits.device.type == "cpu" and numba_rows.AVAILABLE:
        if numba_rows.reads(logits):
            return numba_rows.row_parts(logits, bans)
        compute = numba_rows.row_parts
    return torch.cat(
        [
            compute(logits[part].float().contiguous(), bans[part])
            for part in row_slices(logits)
        ]
    )


def _reference_parts(logits: torch.Tensor, bans: torch.Tensor) -> torch.Tensor:
    num_rows, vocab = logits.shape
    if num_rows == 0:
        return _no_token(num_rows, logits.device)
    scores = logits.float()
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    column = bans.clamp(min=0)[:, None]
    left_out = (bans >= 0)[:, None]
    scores.scatter_(
        1, column, scores.gather(1, column).masked_fill(left_out, -torch.inf)
    )
    best, argmax = scores.max(dim=1)
    # In a row of -inf all tokens are equal, but for the banned one.
    lowest = (bans == 0).double()
    lowest = lowest.masked_fill(lowest >= vocab, torch.inf)
    token = torch.where(best == -torch.inf, lowest, argmax.double())
    delta = (scores - best[:, None]).nan_to_num_(nan=-torch.inf).clamp_(min=-1e4)
    weight = delta.exp()
    total = weight.sum(dim=1, dtype=torch.float64)
    spread = delta.mul_(weight).sum(dim=1, dtype=torch.float64)
    second = scores.scatter_(1, argmax[:, None], -torch.inf).amax(dim=1)
    return torch.stack([best.double(), token, total, spread, second.double()], dim=1)


def _no_token(num_rows: int, device: torch.device) -> torch.Tensor:
    parts = torch.zeros(num_rows, _PARTS, dtype=torch.float64, device=device)
    parts[:, [0, 4]], parts[:, 1] = -torch.inf, torch.inf
    return parts


def row_slices(logits: torch.Tensor) -> Iterator[slice]:
    """Slices of rows small enough to be copied as float32."""
    most = _SLICE_CPU if logits.device.type == "cpu" else _SLICE
    size = max(1, most // max(1, logits.shape[1]))
    for first in range(0, logits.shape[0], size):
        yield slice(first, first + size)


def triton_kernels(logits: torch.Tensor) -> ModuleType | None:
    """`triton_rows`, where it can serve these logits; else None."""
    return _triton_rows() if logits.is_cuda and logits.numel() > 0 else None


@functools.cache
def _triton_rows() -> ModuleType | None:
    try:
        return importlib.import_module("vllm_dlm.kernels.triton_rows")
    except ImportError:  # no Triton for this platform
        return None
