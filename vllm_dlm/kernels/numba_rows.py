# SPDX-License-Identifier: Apache-2.0
"""Loops over rows of logits on a CPU, in numba: statistics, draws, largest logits.

Statistics and draws are of whole rows, or of classes of tokens (`class_stats.py`).

The loops work on the bits of float32 or bfloat16 logits: as integers they compare in
the order of the numbers, which LLVM vectorises, and NaN, which it does not, is mapped
to -inf on the way. A chunk of a row is read from memory once, and used twice from the
first-level cache: for its maximum, then for the sums relative to the largest so far.

They are in one file because numba's cache on disk sees changes in this file only.
Threads are started per call: numba's own pools break engines that fork later, or
compete with torch's.

Three things decide how fast they are: integers of 32 bits or less throughout (numba
makes 64-bit integers of a sum, product or shift by a variable, and LLVM narrows only
what it can prove), choices without branches, and vectors of 512 bits (`full_width`).
The inner loop of the statistics then spends 16 vector instructions on 16 logits.
Tried for it without gain: bfloat16 logits read in pairs, chunks of other sizes. C++ by
hand in AVX-512 intrinsics was as fast, but needs a compiler, and a version for each
instruction set (docs/performance.md).
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from vllm_dlm.kernels import numba_jit
from vllm_dlm.kernels.numba_jit import full_width, jit

AVAILABLE = numba_jit.AVAILABLE
"""Whether the functions of this file can be called."""

_WORTH_A_THREAD = 1 << 20
"""Logits below which starting a thread costs more than it saves."""
_CHUNK = 2048
"""Logits that are summed in float32 before going on in float64, 4 or 8 KiB."""
_SCAN = 128
"""Logits looked at one by one where some belong to a row's largest."""


def reads(logits: torch.Tensor) -> bool:
    """Whether [N, V] logits can be read where they are, without a copy."""
    return logits.dtype in (torch.float32, torch.bfloat16) and (
        logits.stride(1) == 1 or logits.shape[1] == 1
    )


def row_parts(logits: torch.Tensor, bans: torch.Tensor) -> torch.Tensor:
    """Five numbers per row; see `token_stats._PARTS`.

    Args:
        logits: [N, V], N and V at least 1, such that `reads(logits)`.
        bans: [N] int64, the token left out of each row; -1 for none.

    Returns:
        [N, 5] float64.
    """
    num_rows, vocab = logits.shape
    parts = np.empty((num_rows, 5), dtype=np.float64)
    flat, stride, short = _bits(logits)
    left_out = bans.contiguous().numpy()

    def work(first: int, last: int) -> None:
        _stats(flat, stride, short, vocab, left_out, first, last, parts)

    in_threads(work, num_rows, num_rows * vocab)
    return torch.from_numpy(parts)


def write_stats(
    logits: torch.Tensor,
    bans: torch.Tensor,
    token: torch.Tensor,
    confidence: torch.Tensor,
    logsumexp: torch.Tensor,
    entropy: torch.Tensor,
    margin: torch.Tensor,
) -> None:
    """Write what `token_stats.finished` makes of the `row_parts` of rows.

    Args:
        logits: [N, V], N and V at least 1, such that `reads(logits)`.
        bans: [N] int64, the token left out of each row; -1 for none.
        token, confidence, logsumexp, entropy, margin: [N], written to.
    """
    num_rows, vocab = logits.shape
    parts = np.empty((num_rows, 5), dtype=np.float64)
    flat, stride, short = _bits(logits)
    left_out = bans.contiguous().numpy()
    columns = [
        tensor.numpy() for tensor in (token, confidence, logsumexp, entropy, margin)
    ]

    def work(first: int, last: int) -> None:
        _stats(flat, stride, short, vocab, left_out, first, last, parts)
        _finish(parts, first, last, *columns)

    in_threads(work, num_rows, num_rows * vocab)


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
    """The token of the highest (logit - top) / temperature + noise in each row.

    Args:
        logits: [N, V], V at least 1, such that `reads(logits)`.
        rows: [M] int64, the rows to draw from. The others are [M] as well:
        bans: int64, the column that is never drawn; -1 for none.
        top: float32, finite.
        temperature: float32, above 0.
        cut: float32; what is scaled to less is never drawn.
        key: int64, key of the row's noise.
        first_token: token id of column 0, for the noise.

    Returns:
        [M] float32 noisy scores, -inf where nothing can be drawn; [M] int64 columns.
    """
    scores = np.empty(len(rows), dtype=np.float32)
    columns = np.empty(len(rows), dtype=np.int64)
    flat, stride, short = _bits(logits)
    vocab = logits.shape[1]
    chosen, left_out = rows.contiguous().numpy(), bans.contiguous().numpy()
    settings = (top.numpy(), temperature.numpy(), cut.numpy())
    keys = key.numpy().view(np.uint64)

    def work(first: int, last: int) -> None:
        _draw(
            flat, stride, short, vocab, chosen, left_out, *settings, keys,
            first_token, first, last, scores, columns,
        )  # fmt: skip

    # Noise costs several times what statistics do.
    in_threads(work, len(rows), 4 * len(rows) * vocab)
    return torch.from_numpy(scores), torch.from_numpy(columns)


def class_parts(
    logits: torch.Tensor,
    columns: torch.Tensor,
    tokens: torch.Tensor,
    first: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Five numbers per row and class of tokens; see `token_stats._PARTS`.

    Args:
        logits: [N, V], N and V at least 1, such that `reads(logits)`.
        columns: [L] int32, of the tokens of all classes, class after class, in each
            class ascending.
        tokens: [L] int32, the ids of these tokens.
        first: [K + 1] int64, where each class begins.
        scale: factor of all logits.

    Returns:
        [N, K, 5] float64.
    """
    num_rows, num_classes = len(logits), len(first) - 1
    parts = np.empty((num_rows, num_classes, 5), dtype=np.float64)
    flat, stride, short = _bits(logits)
    lists = columns.numpy(), tokens.numpy(), first.numpy()

    def work(begin: int, end: int) -> None:
        _class_stats(flat, stride, short, *lists, np.float32(scale), begin, end, parts)

    in_threads(work, num_rows, 2 * num_rows * len(columns))
    return torch.from_numpy(parts)


def class_draws(
    logits: torch.Tensor,
    columns: torch.Tensor,
    tokens: torch.Tensor,
    first: torch.Tensor,
    top: torch.Tensor,
    temperature: torch.Tensor,
    key: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest (logit - top) / temperature + noise of each row and class.

    Args:
        logits, columns, tokens, first: as `class_parts` takes them.
        top, temperature: [N] float32, finite; key: [N] int64; as in `draw_rows`.

    Returns:
        [N, K] float32 noisy scores, -inf where nothing can be drawn; [N, K] int64
        places among the L tokens.
    """
    shape = len(logits), len(first) - 1
    scores = np.empty(shape, dtype=np.float32)
    places = np.empty(shape, dtype=np.int64)
    flat, stride, short = _bits(logits)
    lists = columns.numpy(), tokens.numpy(), first.numpy()
    settings = (top.numpy(), temperature.numpy(), key.numpy().view(np.uint64))

    def work(begin: int, end: int) -> None:
        _class_draw(flat, stride, short, *lists, *settings, begin, end, scores, places)

    in_threads(work, len(logits), 4 * len(logits) * len(columns))
    return torch.from_numpy(scores), torch.from_numpy(places)


def largest_rows(
    logits: torch.Tensor, k: int, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of the k largest logits of each row, and the rank of a given logit.

    Args:
        logits: [N, V], N and V at least 1, such that `reads(logits)`.
        k: 0 to V.
        chosen: [N] float32, no NaN.

    Returns:
        [N, k] int64, largest first, lower columns first on ties, NaN as -inf; [N]
        int64, how many logits are at least `chosen`.
    """
    num_rows, vocab = logits.shape
    columns = np.empty((num_rows, k), dtype=np.int64)
    ranks = np.empty(num_rows, dtype=np.int64)
    flat, stride, short = _bits(logits)
    bounds = chosen.contiguous().view(torch.int32).numpy()

    def work(first: int, last: int) -> None:
        _most(flat, stride, short, vocab, bounds, first, last, columns, ranks)

    in_threads(work, num_rows, num_rows * vocab)
    return torch.from_numpy(columns), torch.from_numpy(ranks)


def _bits(logits: torch.Tensor) -> tuple[Any, int, Literal[True] | None]:
    """The logits as one flat array of integers, the row stride, and `short`.

    `short` is True for bfloat16, and None for float32: numba compiles each function
    for either, with the test for None decided.
    """
    num_rows, vocab = logits.shape
    stride, wide = logits.stride(0), logits.dtype == torch.float32
    flat = logits.detach().as_strided(((num_rows - 1) * stride + vocab,), (1,))
    bits = flat.view(torch.int32 if wide else torch.int16).numpy()
    return bits, stride, None if wide else True


def in_threads(work: Callable[[int, int], None], num_rows: int, size: int) -> None:
    """Call `work` with ranges that together are all rows; `size` in logits."""
    num_threads = max(
        1, min(torch.get_num_threads(), num_rows, size // _WORTH_A_THREAD)
    )
    cuts = [num_rows * i // num_threads for i in range(num_threads + 1)]

    def unbound(first: int, last: int) -> None:
        if sys.platform == "linux":
            os.sched_setaffinity(0, _cpus())
        work(first, last)

    threads = [
        threading.Thread(target=unbound, args=(cuts[i], cuts[i + 1]))
        for i in range(1, num_threads)
    ]
    for thread in threads:
        thread.start()
    work(cuts[0], cuts[1])
    for thread in threads:
        thread.join()


@functools.cache
def _cpus() -> frozenset[int]:
    """The CPUs of all our threads: OpenMP may have bound this one to a single CPU."""
    cpus: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            cpus |= os.sched_getaffinity(int(thread))
    return frozenset(cpus)


# --- Compiled ----------------------------------------------------------------------


# Division by zero is infinite, as in torch: a check for it would stop LLVM.
_EXACT = jit(error_model="numpy", fastmath={"contract"})
# Sums may be reordered, into vector lanes; NaN and infinity keep their meaning.
_REORDERED = jit(error_model="numpy", fastmath={"contract", "reassoc"})

_MINUS_INFINITY = -0x7F800000
"""-inf as `_ordered` maps it."""
_NOTHING = -0x80000000
"""Less than all that `_ordered` maps to: the largest of no logits."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


@_EXACT
def _float_bits(bits: Any, short: Any) -> Any:
    """The bits of the float32 number that a logit's bits stand for.

    The shift must be by a constant: by a variable, numba shifts 64-bit integers.
    """
    return np.int32(bits) if short is None else np.int32(np.int32(bits) << np.int32(16))


@_EXACT
def _ordered(bits: Any) -> Any:
    """Float32 bits -> int32 in the order of the numbers; -0 is 0, NaN is -inf."""
    magnitude = np.int32(bits & np.int32(0x7FFFFFFF))
    if magnitude > np.int32(0x7F800000):
        return np.int32(_MINUS_INFINITY)
    return np.int32(-magnitude) if bits < 0 else magnitude


@_EXACT
def _number(ordered: Any) -> Any:
    """The float32 that `_ordered` mapped to this int32."""
    bits = np.int32(-ordered) | np.int32(-0x80000000) if ordered < 0 else ordered
    return np.int32(bits).view(np.float32)


@_EXACT
def _exp(x: Any) -> Any:
    """exp of a float32 in [-88, 0], relative error below 4e-7; of -88 it is 0.

    Adding 1.5 * 2**23 rounds to an integer, which the 127 added with it makes the
    exponent bits of 2**power. The polynomial is a minimax fit on [-0.35, 0.35].
    """
    shifted = np.float32(x * np.float32(1.44269504) + np.float32(12583039.0))
    power = shifted - np.float32(12583039.0)
    rest = x - power * np.float32(0.69314718)
    value = np.float32(8.2902722e-3)
    value = value * rest + np.float32(4.1898161e-2)
    value = value * rest + np.float32(1.6667639e-1)
    value = value * rest + np.float32(4.9999148e-1)
    value = value * rest + np.float32(9.9999970e-1)
    value = value * rest + np.float32(1.0)
    scale = np.int32(np.float32(shifted).view(np.int32) << np.int32(23))
    return value * scale.view(np.float32)


@_EXACT
def _log(x: Any) -> Any:
    """log of a normal float32 above 0 within 2 ulp (Cephes' polynomial)."""
    bits = np.float32(x).view(np.int32)
    power = np.int32(np.int32(bits - np.int32(0x3F3504F3)) >> np.int32(23))
    mantissa = np.int32(bits - np.int32(power << np.int32(23)))
    rest = mantissa.view(np.float32) - np.float32(1.0)
    square = rest * rest
    value = np.float32(7.0376836292e-2)
    value = value * rest - np.float32(1.1514610310e-1)
    value = value * rest + np.float32(1.1676998740e-1)
    value = value * rest - np.float32(1.2420140846e-1)
    value = value * rest + np.float32(1.4249322787e-1)
    value = value * rest - np.float32(1.6668057665e-1)
    value = value * rest + np.float32(2.0000714765e-1)
    value = value * rest - np.float32(2.4999993993e-1)
    value = value * rest + np.float32(3.3333331174e-1)
    value = value * rest * square - np.float32(2.12194440e-4) * np.float32(power)
    value = value - np.float32(0.5) * square
    return rest + value + np.float32(0.693359375) * np.float32(power)


# Loops run over arrays from index 0: an index that could be negative, as numpy allows
# it, keeps LLVM from loading vectors.


@_REORDERED
def _largest(bits: Any, short: Any) -> Any:
    """The largest as `_ordered` maps it; `_NOTHING` of no logits.

    Bits of numbers from 0 up are ordered as integers are, those of negative numbers
    the other way round: so it takes the extremes of the integers as they are, twice
    as many bfloat16 in a vector as float32. Only a NaN without sign is above all.
    """
    full_width()
    if bits.size == 0:
        return np.int32(_NOTHING)
    high, low = bits[0], bits[0]
    for i in range(bits.size):
        high, low = max(high, bits[i]), min(low, bits[i])
    found = _float_bits(high if high >= 0 else low, short)
    if found <= np.int32(0x7F800000):
        return _ordered(found)
    best = np.int32(_MINUS_INFINITY)
    for i in range(bits.size):
        best = np.int32(max(best, _ordered(_float_bits(bits[i], short))))
    return best


@_REORDERED
def _place(bits: Any, short: Any, value: Any) -> Any:
    """The first place of what `_ordered` maps to `value`; the size if there is none."""
    full_width()
    nowhere = place = np.int32(bits.size)
    for i in range(bits.size):
        found = _ordered(_float_bits(bits[i], short)) == value
        place = np.int32(min(place, np.int32(i) if found else nowhere))
    return np.int64(place)


@_REORDERED
def _sums(bits: Any, short: Any, top: Any) -> Any:
    """Sums of exp(d) and d exp(d) for d = logit - top."""
    full_width()
    total, spread = np.float32(0.0), np.float32(0.0)
    for i in range(bits.size):
        delta = np.int32(_float_bits(bits[i], short)).view(np.float32) - top
        # False for NaN. At -88, the weight is 0.
        delta = delta if delta > np.float32(-88.0) else np.float32(-88.0)
        weight = _exp(delta)
        total += weight
        spread += delta * weight
    return total, spread


@_REORDERED
def _count(bits: Any, short: Any, bound: Any) -> Any:
    full_width()
    count = np.int32(0)
    for i in range(bits.size):
        enough = _ordered(_float_bits(bits[i], short)) >= bound
        count = np.int32(count + (np.int32(1) if enough else np.int32(0)))
    return count


@_EXACT
def _stats(flat, stride, short, vocab, bans, first_row, last_row, parts):  # type: ignore[no-untyped-def]
    for row in range(first_row, last_row):
        logits = flat[row * stride : row * stride + vocab]
        ban = bans[row]
        best, second = np.int32(_NOTHING), np.int32(_MINUS_INFINITY)
        total, spread = 0.0, 0.0
        start, end = 0, 0  # the chunk of the first largest logit
        # In front of the banned token, and behind it.
        for side in range(1 if ban < 0 else 2):
            first = 0 if side == 0 else ban + 1
            stop = ban if side == 0 and ban >= 0 else vocab
            while first < stop:
                last = min(first + _CHUNK, stop)
                chunk = logits[first:last]
                found = _largest(chunk, short)
                if found > best:
                    if total > 0.0:
                        # Sums so far were relative to the former best.
                        change = np.float64(_number(best)) - np.float64(_number(found))
                        weight = math.exp(change)
                        spread = weight * (spread + change * total)
                        total = weight * total
                    second, best = max(second, best), found
                    start, end = first, last
                elif found > second:
                    second = found
                top = _number(best)
                if np.isfinite(top):
                    sums = _sums(chunk, short, top)
                    total += sums[0]
                    spread += sums[1]
                first = last
        token = start + _place(logits[start:end], short, best)
        second = max(second, _largest(logits[start:token], short))
        second = max(second, _largest(logits[token + 1 : end], short))
        parts[row, 0] = _number(max(best, np.int32(_MINUS_INFINITY)))
        parts[row, 1] = token if token < end else np.inf
        parts[row, 2] = total
        parts[row, 3] = spread
        parts[row, 4] = _number(second)


@_EXACT
def _finish(parts, first_row, last_row, token, confidence, logsumexp, entropy, margin):  # type: ignore[no-untyped-def]
    for row in range(first_row, last_row):
        best, total = parts[row, 0], parts[row, 2]
        place = parts[row, 1]
        token[row] = np.int64(0) if place == np.inf else np.int64(place)
        if np.isfinite(best):
            log_total = math.log(total)
            confidence[row] = 1.0 / total
            logsumexp[row] = best + log_total
            entropy[row] = log_total - parts[row, 3] / total
            margin[row] = (1.0 - math.exp(parts[row, 4] - best)) / total
        else:
            confidence[row], logsumexp[row] = 0.0, best
            entropy[row], margin[row] = 0.0, 0.0


@_EXACT
def _mix(bits: Any) -> Any:
    bits = (bits ^ (bits >> np.uint64(30))) * _FIRST
    bits = (bits ^ (bits >> np.uint64(27))) * _SECOND
    return bits ^ (bits >> np.uint64(31))


@_EXACT
def _exponentials(key: Any, first_token: int, out: Any) -> None:
    """-log1p(-v) for the v of `draw.token_noise`, for a token per place of `out`.

    A loop each for the hash, this logarithm and the next: LLVM vectorises them alone.
    """
    full_width()
    for i in range(out.size):
        number = np.uint64(first_token + i + 1)
        bits = np.int64(_mix(key + number * _GOLDEN) >> np.uint64(11))
        v = (np.float32(bits) + np.float32(0.5)) * np.float32(2.0**-53)
        out[i] = min(v, np.float32(1.0 - 2.0**-24))
    _exponential(out)


@_EXACT
def _exponential(out: Any) -> None:
    """-log1p(-v) in place of each v."""
    full_width()
    for i in range(out.size):
        v = out[i]
        rest = np.float32(1.0) - v
        # The second term is what rounding 1 - v has lost.
        out[i] = -(_log(rest) + ((np.float32(1.0) - rest) - v) / rest)


@_EXACT
def _noisy(
    bits: Any, short: Any, top: Any, temperature: Any, cut: Any, noise: Any
) -> None:
    """Replace exponential numbers by scores with Gumbel noise, -inf below `cut`."""
    full_width()
    for i in range(bits.size):
        logit = np.int32(_float_bits(bits[i], short)).view(np.float32)
        score = np.float32((logit - top) / temperature)
        noisy = score - _log(noise[i])
        noise[i] = noisy if score >= cut else np.float32(-np.inf)


@_EXACT
def _draw(  # type: ignore[no-untyped-def]
    flat, stride, short, vocab, rows, bans, tops, temperatures, cuts, keys, first_token,
    first_row, last_row, scores, columns,
):  # fmt: skip
    buffer = np.empty(_CHUNK, dtype=np.float32)
    for row in range(first_row, last_row):
        begin = rows[row] * stride
        best, column = np.int32(_MINUS_INFINITY), np.int64(0)
        for first in range(0, vocab, _CHUNK):
            last = min(first + _CHUNK, vocab)
            noisy = buffer[: last - first]
            _exponentials(keys[row], first_token + first, noisy)
            _noisy(
                flat[begin + first : begin + last], short,
                tops[row], temperatures[row], cuts[row], noisy,
            )  # fmt: skip
            if first <= bans[row] < last:
                noisy[bans[row] - first] = -np.inf
            bits = noisy.view(np.int32)
            found = _largest(bits, None)
            if found > best:
                best, column = found, first + _place(bits, None, found)
        scores[row] = _number(best)
        columns[row] = column


@_EXACT
def _exponentials_of(key: Any, tokens: Any, out: Any) -> None:
    """As `_exponentials`, of tokens that do not follow each other."""
    full_width()
    for i in range(out.size):
        number = np.uint64(tokens[i]) + np.uint64(1)
        bits = np.int64(_mix(key + number * _GOLDEN) >> np.uint64(11))
        v = (np.float32(bits) + np.float32(0.5)) * np.float32(2.0**-53)
        out[i] = min(v, np.float32(1.0 - 2.0**-24))
    _exponential(out)


@_EXACT
def _gather(row: Any, short: Any, columns: Any, out: Any) -> None:
    """The logits of some columns of a row, as bits of float32."""
    full_width()
    for i in range(out.size):
        out[i] = _float_bits(row[columns[i]], short)


@_EXACT
def _class_stats(  # type: ignore[no-untyped-def]
    flat, stride, short, columns, tokens, first, scale, first_row, last_row, parts
):
    gathered = np.empty(columns.size, dtype=np.int32)
    values = gathered.view(np.float32)
    for row in range(first_row, last_row):
        _gather(flat[row * stride :], short, columns, gathered)
        if scale != np.float32(1.0):
            for i in range(values.size):
                values[i] *= scale
        for k in range(first.size - 1):
            begin, end = first[k], first[k + 1]
            own = gathered[begin:end]
            best = max(_largest(own, None), np.int32(_MINUS_INFINITY))
            place = np.int64(0) if end - begin == 1 else _place(own, None, best)
            second = np.int32(_MINUS_INFINITY)
            if end - begin > 1:
                second = max(second, _largest(own[:place], None))
                second = max(second, _largest(own[place + 1 :], None))
            top = _number(best)
            total, spread = 0.0, 0.0
            if np.isfinite(top):
                if end - begin == 1:
                    total = 1.0
                else:
                    for chunk in range(begin, end, _CHUNK):
                        last = min(chunk + _CHUNK, end)
                        sums = _sums(gathered[chunk:last], None, top)
                        total += sums[0]
                        spread += sums[1]
            parts[row, k, 0] = top
            parts[row, k, 1] = tokens[begin + place] if begin < end else np.inf
            parts[row, k, 2] = total
            parts[row, k, 3] = spread
            parts[row, k, 4] = _number(second)


@_EXACT
def _class_draw(  # type: ignore[no-untyped-def]
    flat, stride, short, columns, tokens, first, tops, temperatures, keys,
    first_row, last_row, scores, places,
):  # fmt: skip
    gathered = np.empty(min(_CHUNK, columns.size), dtype=np.int32)
    noisy = np.empty(columns.size, dtype=np.float32)
    for row in range(first_row, last_row):
        for begin in range(0, columns.size, _CHUNK):
            end = min(begin + _CHUNK, columns.size)
            own, noise = gathered[: end - begin], noisy[begin:end]
            _gather(flat[row * stride :], short, columns[begin:end], own)
            _exponentials_of(keys[row], tokens[begin:end], noise)
            _noisy(own, None, tops[row], temperatures[row], np.float32(-np.inf), noise)
        bits = noisy.view(np.int32)
        for k in range(first.size - 1):
            own = bits[first[k] : first[k + 1]]
            best = max(_largest(own, None), np.int32(_MINUS_INFINITY))
            scores[row, k] = _number(best)
            place = _place(own, None, best)
            places[row, k] = first[k] + (place if place < own.size else 0)


@_EXACT
def _most(flat, stride, short, vocab, bounds, first_row, last_row, columns, ranks):  # type: ignore[no-untyped-def]
    k = columns.shape[1]
    values = np.empty(k + 1, dtype=np.int32)
    for row in range(first_row, last_row):
        bound = _ordered(bounds[row])
        logits = flat[row * stride : row * stride + vocab]
        ranks[row] = _count(logits, short, bound)
        filled = 0
        for first in range(0, vocab if k > 0 else 0, _SCAN):
            last = min(first + _SCAN, vocab)
            chunk = logits[first:last]
            if filled == k and _largest(chunk, short) <= values[k - 1]:
                continue
            for i in range(last - first):
                value = _ordered(_float_bits(chunk[i], short))
                if filled == k and value <= values[k - 1]:
                    continue
                place = min(filled, k - 1)
                while place > 0 and values[place - 1] < value:
                    values[place] = values[place - 1]
                    columns[row, place] = columns[row, place - 1]
                    place -= 1
                values[place] = value
                columns[row, place] = first + i
                filled = min(filled + 1, k)
