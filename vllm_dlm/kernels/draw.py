# SPDX-License-Identifier: Apache-2.0
"""Seeded draws of candidate tokens: temperature, top-k, top-p and min-p, row by row.

A token is drawn by the Gumbel-max trick, argmax(logit / temperature + noise). The noise
is no generator's state but a hash of (seed, position, step, token id): a request draws
the same tokens at any batch size, in any row, and on any device up to the last digit of
a logarithm.

The hash is SplitMix64's finaliser (Steele, Lea, Flood 2014) in wrapping int64
arithmetic: one round each over seed, position and step gives a row's key, one more over
key + (token id + 1) * golden ratio the token's 64 bits; token id -1 serves `uniform`,
and -2 `random_tokens`.

Rows without top-k and top-p are drawn in one pass, by numba or Triton where present;
the noise of a token is never stored. The versions hash alike, bit for bit, and differ
by a few units in the last place of two logarithms: they draw different tokens only
where the two best noisy scores are that close, about once in a million draws.
"""

from __future__ import annotations

import torch

from vllm_dlm.kernels import numba_rows
from vllm_dlm.kernels.shards import VocabShard, best_of, logit_of
from vllm_dlm.kernels.token_stats import (
    banned_ids,
    forbid,
    triton_kernels,
)

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)

_SLICE_CPU = 1 << 17
_SLICE = 1 << 22
"""Logits per slice of rows: the hash takes 8 bytes each, on a CPU from its cache."""


def draw(
    logits: torch.Tensor,
    argmax: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    step: torch.Tensor,
    rows: torch.Tensor | None = None,
    truncated_rows: torch.Tensor | None = None,
    banned: torch.Tensor | None = None,
    ban_id: int = -1,
    shard: VocabShard | None = None,
) -> torch.Tensor:
    """One token per row; the argmax where the temperature is 0.

    The order is vLLM's: temperature, min-p, top-k (ties of the k-th logit all stay),
    top-p of what is left (ties at the edge: lower ids stay).

    Args:
        logits: [N, V], floating point. NaN counts as -inf.
        argmax: [N] int64, `TokenStats.argmax` of the same logits.
        temperature: [N]; 0 is greedy.
        top_k: [N] integer; 0 or less is off.
        top_p: [N] in (0, 1]; 1 is off.
        min_p: [N] in [0, 1]; 0 is off.
        seed: [N] int64.
        position: [N] int64, of the token in the request, not in the batch.
        step: [N] int64, denoise step; the same triple gives the same noise.
        rows: [M] int64, the rows with temperature > 0, top-k off and top-p off.
        truncated_rows: int64, the other rows with temperature > 0: these are sorted,
            which is slow. A row in both is drawn twice and truncated in the end.
            Where the host knows both, give both: if one is None, both are found here,
            and a GPU has to be waited for.
        banned: [N] bool, rows in which `ban_id` is never drawn; None means all rows.
        ban_id: the mask id; -1 for none.
        shard: which part of the vocabulary the columns are, as in `token_stats`.
            `truncated_rows` must be empty then: sorting needs whole rows.

    Returns:
        [N] int64.
    """
    if rows is None or truncated_rows is None:
        hot, cut = temperature > 0, (top_k > 0) | (top_p < 1)
        rows = (hot & ~cut).nonzero()[:, 0]
        truncated_rows = (hot & cut).nonzero()[:, 0]
    if len(truncated_rows) and shard is not None:
        raise ValueError(
            "rows with top-k or top-p need the whole vocabulary: gather their logits "
            "and draw them without a shard"
        )
    tokens = argmax.clone()
    key = row_key(seed, position, step)
    if len(rows):
        columns = logits if shard is None else shard.columns(logits)
        bans = banned_ids(
            columns, banned, ban_id if shard is None else shard.column(ban_id)
        )
        top = logit_of(logits, argmax, shard)[rows].float()
        # A row without a finite maximum has nothing to draw from.
        usable = top.isfinite()
        drawn = _plain_draws(
            columns,
            rows,
            bans[rows],
            torch.where(usable, top, 0.0),
            temperature[rows].float(),
            min_p[rows].float().log(),
            key[rows],
            shard,
        )
        tokens.index_copy_(0, rows, torch.where(usable, drawn, argmax[rows]))
    size = rows_per_slice(logits)
    for part in truncated_rows.split(size) if len(truncated_rows) else ():
        part_banned = None if banned is None else banned[part]
        scores = forbid(logits[part].float(), part_banned, ban_id)
        top = scores.max(dim=1, keepdim=True).values
        scores = _scaled(scores, top, temperature[part], min_p[part].log())
        scores, ids = _truncated(scores, top_k[part], top_p[part])
        drawn = (scores + token_noise(key[part], ids)).argmax(dim=1)
        drawn = ids.gather(1, drawn[:, None])[:, 0]
        drawn = torch.where(top[:, 0].isfinite(), drawn, argmax[part])
        tokens.index_copy_(0, part, drawn)
    return tokens


def tempered(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """Logits of the distribution that `draw` draws from; arguments as there.

    Returns:
        [N, V] float32; -inf where a token cannot be drawn. Temperatures must be > 0.
    """
    scores = logits.float()
    top = scores.max(dim=1, keepdim=True).values
    kept, ids = _truncated(_scaled(scores, top, temperature, min_p.log()), top_k, top_p)
    return torch.empty_like(kept).scatter_(1, ids, kept)


def uniform(
    seed: torch.Tensor, position: torch.Tensor, step: torch.Tensor
) -> torch.Tensor:
    """Uniform numbers in [0, 1), independent of the noise of `draw`.

    Args:
        seed, position, step: int64 tensors that broadcast together, [N] say.

    Returns:
        float32 of the broadcast shape; a pure function of the three numbers.
    """
    bits = _mix(row_key(seed, position, step))
    return _shifted(bits, 40).float() * 2.0**-24


def random_tokens(
    seed: torch.Tensor, position: torch.Tensor, step: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Tokens drawn uniformly, independent of the noise of `draw` and of `uniform`.

    Args:
        seed, position, step: int64 tensors that broadcast together, [N] say.
        vocab_size: all ids are below it. The remainder of 63 bits favours lower ids by
            less than one in 2^40 for any vocabulary that there is.

    Returns:
        int64 of the broadcast shape; a pure function of the three numbers.
    """
    bits = _mix(row_key(seed, position, step) - _GOLDEN)
    return _shifted(bits, 1) % vocab_size


def _plain_draws(
    logits: torch.Tensor,
    rows: torch.Tensor,
    bans: torch.Tensor,
    top: torch.Tensor,
    temperature: torch.Tensor,
    cut: torch.Tensor,
    key: torch.Tensor,
    shard: VocabShard | None,
) -> torch.Tensor:
    """[M] tokens of rows [M] of [N, V] logits; the rest as in `_plain_draw_reference`.

    The best of every rank is gathered where there is a shard.
    """
    settings = (bans, top, temperature, cut, key)
    first = 0 if shard is None else shard.first
    triton_rows = triton_kernels(logits)
    if logits.shape[1] == 0:
        scores = torch.full_like(top, -torch.inf)
        columns = torch.zeros_like(rows)
    elif triton_rows is not None:
        scores, columns = triton_rows.draw_rows(logits, rows, *settings, first)
    elif (
        logits.device.type == "cpu"
        and numba_rows.AVAILABLE
        and numba_rows.reads(logits)
    ):
        scores, columns = numba_rows.draw_rows(logits, rows, *settings, first)
    else:
        size = rows_per_slice(logits)
        parts = [
            _plain_draw_reference(
                logits[rows[part]],
                bans[part],
                top[part],
                temperature[part],
                cut[part],
                key[part],
                first,
            )
            for part in torch.arange(len(rows), device=rows.device).split(size)
        ]
        scores, columns = map(torch.cat, zip(*parts, strict=True))
    tokens = columns + first
    if shard is None:
        return tokens
    pairs = shard.gather(torch.stack([scores.double(), tokens.double()], dim=1))
    return best_of(pairs[..., 0], pairs[..., 1]).long()


def _plain_draw_reference(
    logits: torch.Tensor,
    bans: torch.Tensor,
    top: torch.Tensor,
    temperature: torch.Tensor,
    cut: torch.Tensor,
    key: torch.Tensor,
    first: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`numba_rows.draw_rows` of all rows in plain torch, with noise for all tokens."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    scores = logits.float()
    left_out = scores.isnan() | (columns == bans[:, None])
    scores = _scaled(
        scores.masked_fill(left_out, -torch.inf), top[:, None], temperature, cut
    )
    best = (scores + token_noise(key, columns + first)).max(dim=1)
    return best.values, best.indices


def rows_per_slice(logits: torch.Tensor) -> int:
    """How many rows of [N, V] logits to sort, or to make noise for, at a time."""
    size = _SLICE_CPU if logits.device.type == "cpu" else _SLICE
    return max(1, size // max(1, logits.shape[1]))


def _scaled(
    scores: torch.Tensor,
    top: torch.Tensor,
    temperature: torch.Tensor,
    cut: torch.Tensor,
) -> torch.Tensor:
    """Scores over temperature, the best at 0; -inf below `cut`, the log of min-p."""
    scores = (scores - top) / temperature[:, None]
    return scores.masked_fill_(scores < cut[:, None], -torch.inf)


def _truncated(
    scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted scores with what top-k and top-p drop at -inf, and their token ids."""
    scores, ids = scores.sort(dim=1, descending=True, stable=True)
    vocab = scores.shape[1]
    last = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).long() - 1
    scores = scores.masked_fill(scores < scores.gather(1, last[:, None]), -torch.inf)
    probability = scores.softmax(dim=1, dtype=torch.float64)
    before = probability.cumsum(dim=1) - probability
    # The first always stays; so does all where top-p is off, whatever the rounding.
    drop = (before >= top_p[:, None]) & (top_p[:, None] < 1) & (before > 0)
    return scores.masked_fill(drop, -torch.inf), ids


def token_noise(key: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Gumbel noise, float32 [N, V], for row keys [N] and token ids [V] or [N, V]."""
    bits = _shifted(_mix(key[:, None] + (ids + 1) * _GOLDEN), 11)
    # -log(-log(u)) is large for u near 1, where float32 is coarse: v = 1 - u is exact
    # there. Below 1, so that the noise never rules a token out by itself.
    v = ((bits.float() + 0.5) * 2.0**-53).clamp_(max=1.0 - 2.0**-24)
    return v.neg_().log1p_().neg_().log_().neg_()


def row_key(
    seed: torch.Tensor, position: torch.Tensor, step: torch.Tensor
) -> torch.Tensor:
    key = _mix(_mix(seed) + (position + 1) * _GOLDEN)
    return _mix(key + (step + 1) * _GOLDEN)


def _mix(bits: torch.Tensor) -> torch.Tensor:
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Right shift that brings in zeros; torch's brings in the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
