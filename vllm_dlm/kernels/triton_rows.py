# SPDX-License-Identifier: Apache-2.0
"""Triton kernels over rows of logits on a GPU: statistics, and plain draws.

Of whole rows, or of classes of tokens (`class_stats.py`).

A row is cut into pieces of fixed length, a program each, so that few rows fill a GPU as
well, and a row's result is the same in every batch. A second, small kernel merges the
pieces. Within a piece every thread keeps its own running maximum and sums over groups
of 8 neighbouring logits, with one rescaling per group, and one reduction at the end.

The kernels stand in one file because they share how a row is cut and read. It can be
imported only where Triton can: see `token_stats.triton_kernels`. It has not been timed
on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_PIECE = 16384
"""Logits per program."""
_WIDTH = 8
"""Logits per group: 16 bytes of bfloat16, one load of a thread."""
_GROUPS = 256
"""Groups side by side, two per thread of four warps."""
_DRAW_BLOCK = 1024

_FAR = tl.constexpr(-1000.0)
"""A difference of logits whose exponential is 0."""
_NOWHERE = tl.constexpr(1 << 30)


def row_parts(logits: torch.Tensor, bans: torch.Tensor) -> torch.Tensor:
    """[N, 5] float64, the numbers of `token_stats._PARTS`; arguments as there."""
    parts = _pieces(logits, bans)
    merged = parts.new_empty(len(parts), 5)
    _merge_kernel[(len(parts),)](
        parts, parts.shape[1], merged, *[merged] * 6,
        FINISH=False, ENTROPY=False, MARGIN=False,
        PIECES=triton.next_power_of_2(parts.shape[1]), num_warps=1,
    )  # fmt: skip
    return merged


def token_stats(
    logits: torch.Tensor, bans: torch.Tensor, need_entropy: bool, need_margin: bool
) -> tuple[torch.Tensor | None, ...]:
    """The columns of `TokenStats` for rows [N, V] that leave out tokens `bans` [N]."""
    parts = _pieces(logits, bans)
    num_rows = len(parts)
    argmax = torch.empty_like(bans)
    logsumexp = parts.new_empty(num_rows)
    logprob, confidence, entropy, margin = torch.empty(
        4, num_rows, dtype=torch.float32, device=logits.device
    ).unbind()
    _merge_kernel[(num_rows,)](
        parts, parts.shape[1], parts,
        argmax, logprob, confidence, logsumexp, entropy, margin,
        FINISH=True, ENTROPY=need_entropy, MARGIN=need_margin,
        PIECES=triton.next_power_of_2(parts.shape[1]), num_warps=1,
    )  # fmt: skip
    return (
        argmax,
        logprob,
        confidence,
        logsumexp,
        entropy if need_entropy else None,
        margin if need_margin else None,
    )


def draw_rows(
    logits: torch.Tensor,
    rows: torch.Tensor,
    bans: torch.Tensor,
    top: torch.Tensor,
    temperature: torch.Tensor,
    cut: torch.Tensor,
    key: torch.Tensor,
    first_token: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `numba_rows.draw_rows`."""
    vocab = logits.shape[1]
    pieces = triton.cdiv(vocab, _PIECE)
    scores = top.new_empty(pieces, len(rows))
    columns = rows.new_empty(pieces, len(rows))
    _draw_kernel[(len(rows), pieces)](
        logits, logits.stride(0), logits.stride(1), vocab,
        rows, bans, top, temperature, cut, key, first_token, scores, columns,
        PIECE=_PIECE, BLOCK=_DRAW_BLOCK, num_warps=4,
    )  # fmt: skip
    best = scores.amax(dim=0)
    columns = torch.where(scores == best, columns, vocab).amin(dim=0)
    return best, columns


def class_parts(
    logits: torch.Tensor,
    columns: torch.Tensor,
    tokens: torch.Tensor,
    pieces: torch.Tensor,
    first: torch.Tensor,
    longest: int,
    scale: float,
) -> torch.Tensor:
    """As `numba_rows.class_parts`.

    Args:
        logits, columns, tokens, scale: as there.
        pieces: [P, 2] int64: begin and end of pieces of the L tokens, class after
            class.
        first: [K + 1] int64: the first piece of each class.
        longest: most tokens of a piece, a power of two.
    """
    num_rows, num_pieces, num_classes = len(logits), len(pieces), len(first) - 1
    parts, merged = (
        torch.empty(num_rows, many, 5, dtype=torch.float64, device=logits.device)
        for many in (num_pieces, num_classes)
    )
    _class_piece_kernel[(num_rows, num_pieces)](
        logits, logits.stride(0), logits.stride(1), columns, tokens, pieces, scale,
        parts, PIECE=longest, num_warps=4,
    )  # fmt: skip
    _class_merge_kernel[(num_rows, num_classes)](
        parts, num_pieces, first, merged, num_warps=1
    )
    return merged


def class_draws(
    logits: torch.Tensor,
    columns: torch.Tensor,
    tokens: torch.Tensor,
    pieces: torch.Tensor,
    first: torch.Tensor,
    longest: int,
    top: torch.Tensor,
    temperature: torch.Tensor,
    key: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `numba_rows.class_draws`; pieces and classes as in `class_parts`."""
    num_rows, num_pieces, num_classes = len(logits), len(pieces), len(first) - 1
    scores, best = (top.new_empty(num_rows, m) for m in (num_pieces, num_classes))
    places, chosen = (key.new_empty(num_rows, m) for m in (num_pieces, num_classes))
    _class_draw_kernel[(num_rows, num_pieces)](
        logits, logits.stride(0), logits.stride(1), columns, tokens, pieces,
        top, temperature, key, scores, places, PIECE=longest, num_warps=4,
    )  # fmt: skip
    _class_best_kernel[(num_rows, num_classes)](
        scores, places, num_pieces, first, best, chosen, num_warps=1
    )
    return best, chosen


def _pieces(logits: torch.Tensor, bans: torch.Tensor) -> torch.Tensor:
    """[N, P, 5] float64: the five numbers of each of P pieces of each row."""
    num_rows, vocab = logits.shape
    pieces = triton.cdiv(vocab, _PIECE)
    parts = torch.empty(num_rows, pieces, 5, dtype=torch.float64, device=logits.device)
    _piece_kernel[(num_rows, pieces)](
        logits, logits.stride(0), logits.stride(1), vocab, bans, parts,
        PIECE=_PIECE, GROUPS=_GROUPS, WIDTH=_WIDTH, num_warps=4,
    )  # fmt: skip
    return parts


@triton.jit
def _at_least(x, least):  # type: ignore[no-untyped-def]
    """The larger one; of NaN, as -inf - -inf is, `least`.

    `tl.maximum` does so on a GPU, but not in every version of the interpreter.
    """
    return tl.where(x > least, x, least)


@triton.jit
def _logits_at(row, stride, ids, vocab):  # type: ignore[no-untyped-def]
    """Float32 logits; -inf for NaN and what is past the end."""
    x = tl.load(row + ids * stride, mask=ids < vocab, other=-float("inf"))
    return _at_least(x.to(tl.float32), -float("inf"))


@triton.jit
def _piece_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    stride,
    vocab,
    bans,
    parts,
    PIECE: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    ban = tl.load(bans + row).to(tl.int32)
    logits += row * row_stride
    first = piece * PIECE
    group = tl.arange(0, GROUPS) * WIDTH
    within = tl.arange(0, WIDTH)

    best = tl.full([GROUPS], -float("inf"), tl.float32)
    second = tl.full([GROUPS], -float("inf"), tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    spread = tl.zeros([GROUPS], tl.float32)
    # Where the first largest logit of each lane is: in its group of which block.
    block = tl.full([GROUPS], 0, tl.int32) + first
    for begin in range(first, tl.minimum(first + PIECE, vocab), GROUPS * WIDTH):
        ids = begin + group[:, None] + within[None, :]
        x = _logits_at(logits, stride, ids, vocab)
        if (ban >= begin) & (ban < begin + GROUPS * WIDTH):
            x = tl.where(ids == ban, -float("inf"), x)
        found = tl.max(x, axis=1)
        top = tl.maximum(best, found)
        # Sums so far were relative to the former best.
        change = _at_least(best - top, _FAR)
        weight = tl.exp(change)
        delta = _at_least(x - top[:, None], _FAR)
        exponential = tl.exp(delta)
        spread = weight * (spread + change * total) + tl.sum(
            delta * exponential, axis=1
        )
        total = weight * total + tl.sum(exponential, axis=1)
        second = tl.maximum(second, tl.minimum(best, found))
        block = tl.where(found > best, begin, block)
        best = top

    top = tl.max(best, axis=0)
    change = _at_least(best - top, _FAR)
    weight = tl.exp(change)
    start = block + group
    winner = tl.min(tl.where(best == top, start, _NOWHERE), axis=0)
    # The winning group is read again for its token and its second-largest logit.
    ids = winner + within
    x = _logits_at(logits, stride, ids, vocab)
    x = tl.where(ids == ban, -float("inf"), x)
    is_top = (x == top) & (ids < vocab) & (ids != ban)
    token = tl.min(tl.where(is_top, ids, _NOWHERE), axis=0)
    others = tl.max(tl.where(ids == token, -float("inf"), x), axis=0)
    others = tl.maximum(others, tl.max(second, axis=0))
    lanes = tl.where(start == winner, -float("inf"), best)
    others = tl.maximum(others, tl.max(lanes, axis=0))

    out = parts + (row * tl.num_programs(1) + piece) * 5
    tl.store(out, top.to(tl.float64))
    tl.store(out + 1, tl.where(token < _NOWHERE, token.to(tl.float64), float("inf")))
    tl.store(out + 2, tl.sum(weight * total, axis=0).to(tl.float64))
    tl.store(out + 3, tl.sum(weight * (spread + change * total), axis=0).to(tl.float64))
    tl.store(out + 4, others.to(tl.float64))


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    parts,
    num_pieces,
    merged,
    argmax_out,
    logprob_out,
    confidence_out,
    logsumexp_out,
    entropy_out,
    margin_out,
    FINISH: tl.constexpr,
    ENTROPY: tl.constexpr,
    MARGIN: tl.constexpr,
    PIECES: tl.constexpr,
):
    """`token_stats.merged` of one row's pieces, and `token_stats.finished` of that."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, PIECES)
    present = piece < num_pieces
    at = parts + (row * num_pieces + piece) * 5
    best = tl.load(at, mask=present, other=-float("inf"))
    token = tl.load(at + 1, mask=present, other=float("inf"))
    total = tl.load(at + 2, mask=present, other=0.0)
    spread = tl.load(at + 3, mask=present, other=0.0)
    second = tl.load(at + 4, mask=present, other=-float("inf"))

    top = tl.max(best, axis=0)
    change = _at_least(best - top, _FAR)
    weight = tl.exp(change)
    spread = tl.sum(weight * (spread + change * total), axis=0)
    total = tl.sum(weight * total, axis=0)
    token = tl.min(tl.where(best == top, token, float("inf")), axis=0)
    winner = tl.min(tl.where(best == top, piece, PIECES), axis=0)
    second = tl.maximum(
        tl.max(second, axis=0),
        tl.max(tl.where(piece == winner, -float("inf"), best), axis=0),
    )
    if FINISH:
        usable = tl.abs(top) < float("inf")
        log_total = tl.log(total)
        token = tl.where(token < float("inf"), token, 0.0)
        tl.store(argmax_out + row, token.to(tl.int64))
        logprob = tl.where(usable, -log_total, -float("inf"))
        tl.store(logprob_out + row, logprob.to(tl.float32))
        confidence = tl.where(usable, 1.0 / total, 0.0)
        tl.store(confidence_out + row, confidence.to(tl.float32))
        tl.store(logsumexp_out + row, tl.where(usable, top + log_total, top))
        if ENTROPY:
            entropy = tl.where(usable, log_total - spread / total, 0.0)
            tl.store(entropy_out + row, entropy.to(tl.float32))
        if MARGIN:
            margin = tl.where(usable, (1.0 - tl.exp(second - top)) / total, 0.0)
            tl.store(margin_out + row, margin.to(tl.float32))
    else:
        tl.store(merged + row * 5, top)
        tl.store(merged + row * 5 + 1, token)
        tl.store(merged + row * 5 + 2, total)
        tl.store(merged + row * 5 + 3, spread)
        tl.store(merged + row * 5 + 4, second)


# --- Classes of tokens -------------------------------------------------------------


@triton.jit
def _class_logits(logits, stride, columns, begin, end, PIECE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Places of a piece's tokens, which of them there are, and their logits."""
    places = begin + tl.arange(0, PIECE)
    present = places < end
    column = tl.load(columns + places, mask=present, other=0).to(tl.int64)
    x = tl.load(logits + column * stride, mask=present, other=-float("inf"))
    return places, present, _at_least(x.to(tl.float32), -float("inf"))


@triton.jit
def _class_piece_kernel(  # type: ignore[no-untyped-def]
    logits, row_stride, stride, columns, tokens, pieces, scale, parts,
    PIECE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    begin, end = tl.load(pieces + 2 * piece), tl.load(pieces + 2 * piece + 1)
    places, present, x = _class_logits(
        logits + row * row_stride, stride, columns, begin, end, PIECE
    )
    x = x * scale
    top = tl.max(x, axis=0)
    delta = _at_least(x - top, _FAR)
    exponential = tl.exp(delta)
    winner = tl.min(tl.where((x == top) & present, places, end - 1), axis=0)
    second = tl.max(tl.where(places == winner, -float("inf"), x), axis=0)
    out = parts + (row * tl.num_programs(1) + piece) * 5
    tl.store(out, top.to(tl.float64))
    tl.store(out + 1, tl.load(tokens + winner).to(tl.float64))
    tl.store(out + 2, tl.sum(exponential, axis=0).to(tl.float64))
    tl.store(out + 3, tl.sum(delta * exponential, axis=0).to(tl.float64))
    tl.store(out + 4, second.to(tl.float64))


@triton.jit
def _class_merge_kernel(parts, num_pieces, first, merged):  # type: ignore[no-untyped-def]
    """`token_stats.merged` of a class's pieces, one after the other."""
    row = tl.program_id(0).to(tl.int64)
    klass = tl.program_id(1)
    begin, end = tl.load(first + klass), tl.load(first + klass + 1)
    at = parts + (row * num_pieces + begin) * 5
    has_any = begin < end
    top = tl.load(at, mask=has_any, other=-float("inf"))
    token = tl.load(at + 1, mask=has_any, other=float("inf"))
    total = tl.load(at + 2, mask=has_any, other=0.0)
    spread = tl.load(at + 3, mask=has_any, other=0.0)
    second = tl.load(at + 4, mask=has_any, other=-float("inf"))
    for piece in range(begin + 1, end):
        at = parts + (row * num_pieces + piece) * 5
        best = tl.load(at)
        token = tl.where(best > top, tl.load(at + 1), token)
        more, mostly = tl.load(at + 2), tl.maximum(top, best)
        change = _at_least(top - mostly, _FAR)
        own_change = _at_least(best - mostly, _FAR)
        weight, own_weight = tl.exp(change), tl.exp(own_change)
        spread = weight * (spread + change * total)
        spread += own_weight * (tl.load(at + 3) + own_change * more)
        total = weight * total + own_weight * more
        second = tl.maximum(tl.maximum(second, tl.load(at + 4)), tl.minimum(top, best))
        top = mostly
    out = merged + (row * tl.num_programs(1) + klass) * 5
    tl.store(out, top)
    tl.store(out + 1, token)
    tl.store(out + 2, total)
    tl.store(out + 3, spread)
    tl.store(out + 4, second)


# --- Draws -------------------------------------------------------------------------


@triton.jit
def _mix(bits):  # type: ignore[no-untyped-def]
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@triton.jit
def _log(x):  # type: ignore[no-untyped-def]
    """`numba_rows._log`: the GPU's own is coarse near 1, where the noise is decided."""
    bits = x.to(tl.int32, bitcast=True)
    power = (bits - 0x3F3504F3) >> 23
    rest = (bits - (power << 23)).to(tl.float32, bitcast=True) - 1.0
    power = power.to(tl.float32)
    square = rest * rest
    value = 7.0376836292e-2 * rest - 1.1514610310e-1
    value = value * rest + 1.1676998740e-1
    value = value * rest - 1.2420140846e-1
    value = value * rest + 1.4249322787e-1
    value = value * rest - 1.6668057665e-1
    value = value * rest + 2.0000714765e-1
    value = value * rest - 2.4999993993e-1
    value = value * rest + 3.3333331174e-1
    value = value * rest * square - 2.12194440e-4 * power
    value = value - 0.5 * square
    return rest + value + 0.693359375 * power


@triton.jit
def _noise(key, tokens):  # type: ignore[no-untyped-def]
    """Gumbel noise of tokens, as `draw.token_noise`."""
    number = (tokens + 1).to(tl.uint64)
    bits = _mix(key + number * 0x9E3779B97F4A7C15) >> 11
    v = (bits.to(tl.float32) + 0.5) * (2.0**-53)
    v = tl.minimum(v, 1.0 - 2.0**-24)
    # log1p(-v), with what rounding 1 - v has lost.
    rest = 1.0 - v
    exponential = -(_log(rest) + tl.div_rn((1.0 - rest) - v, rest))
    return -_log(exponential)


@triton.jit
def _class_draw_kernel(  # type: ignore[no-untyped-def]
    logits, row_stride, stride, columns, tokens, pieces, tops, temperatures, keys,
    scores, chosen,
    PIECE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    begin, end = tl.load(pieces + 2 * piece), tl.load(pieces + 2 * piece + 1)
    places, present, x = _class_logits(
        logits + row * row_stride, stride, columns, begin, end, PIECE
    )
    score = tl.div_rn(x - tl.load(tops + row), tl.load(temperatures + row))
    key = tl.load(keys + row).to(tl.uint64, bitcast=True)
    token = tl.load(tokens + places, mask=present, other=0).to(tl.int64)
    noisy = tl.where(x > -float("inf"), score + _noise(key, token), -float("inf"))
    best = tl.max(noisy, axis=0)
    out = row * tl.num_programs(1) + piece
    tl.store(scores + out, best)
    place = tl.min(tl.where((noisy == best) & present, places, end - 1), axis=0)
    tl.store(chosen + out, place)


@triton.jit
def _class_best_kernel(scores, places, num_pieces, first, best_out, place_out):  # type: ignore[no-untyped-def]
    """The best piece of each class, the first one on ties."""
    row = tl.program_id(0).to(tl.int64)
    klass = tl.program_id(1)
    begin, end = tl.load(first + klass), tl.load(first + klass + 1)
    best = tl.load(
        scores + row * num_pieces + begin, mask=begin < end, other=-float("inf")
    )
    place = tl.load(places + row * num_pieces + begin, mask=begin < end, other=0)
    for piece in range(begin + 1, end):
        score = tl.load(scores + row * num_pieces + piece)
        place = tl.where(
            score > best, tl.load(places + row * num_pieces + piece), place
        )
        best = tl.maximum(best, score)
    out = row * tl.num_programs(1) + klass
    tl.store(best_out + out, best)
    tl.store(place_out + out, place)


@triton.jit
def _draw_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    stride,
    vocab,
    rows,
    bans,
    tops,
    temperatures,
    cuts,
    keys,
    first_token,
    scores,
    columns,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    piece = tl.program_id(1)
    logits += tl.load(rows + index) * row_stride
    ban = tl.load(bans + index).to(tl.int32)
    top = tl.load(tops + index)
    temperature = tl.load(temperatures + index)
    cut = tl.load(cuts + index)
    key = tl.load(keys + index).to(tl.uint64, bitcast=True)

    first = piece * PIECE
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    where = tl.full([BLOCK], _NOWHERE, tl.int32)
    for begin in range(first, tl.minimum(first + PIECE, vocab), BLOCK):
        ids = begin + lane
        x = _logits_at(logits, stride, ids, vocab)
        x = tl.where(ids == ban, -float("inf"), x)
        score = tl.div_rn(x - top, temperature)
        gumbel = _noise(key, first_token + ids)
        noisy = tl.where(score >= cut, score + gumbel, -float("inf"))
        where = tl.where(noisy > best, ids, where)
        best = tl.maximum(best, noisy)
    found = tl.max(best, axis=0)
    column = tl.min(tl.where(best == found, where, _NOWHERE), axis=0)
    out = piece * tl.num_programs(0) + index
    tl.store(scores + out, found)
    # Nothing was drawn: a column that exists loses to what was.
    tl.store(columns + out, tl.where(column < _NOWHERE, column, 0).to(tl.int64))
