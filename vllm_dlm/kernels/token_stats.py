# SPDX-License-Identifier: Apache-2.0
"""What a denoise step needs to know of each row of logits, without float32 copies.

Softmax, argmax, entropy and top-2 as separate torch calls read the vocabulary many
times and write float32 `[rows, vocab]` copies of it; here a row is read while it is in
cache and only `[rows]` numbers are kept.

On a CPU the numba version is used at every size: on one of 2 cores of a Xeon with
AVX-512, all statistics of `[256, 126464]` in float32 took 62 ms, the reference 707 ms;
of `[512, 128]`, 0.21 ms and 0.59 ms. Elsewhere, or without numba, torch works through
slices of rows.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

try:
    import numba
except ImportError:  # the extra "cpu" is not installed
    numba = None

F = TypeVar("F", bound=Callable[..., Any])

_SLICE = 1 << 23
"""Logits per slice of rows where a float32 copy is made (32 MiB)."""
_WORTH_A_THREAD = 1 << 20
"""Logits below which starting a thread costs more than it saves."""
_CHUNK = 1024
"""Logits summed in float32 before going on in float64."""


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
) -> TokenStats:
    """Statistics of each row; the result for a row never depends on other rows.

    Args:
        logits: [N, V], floating point. NaN counts as -inf.
        need_entropy, need_margin: whether to compute them (None otherwise).
        banned: [N] bool, the rows in which token `ban_id` is left out of everything.
            None bans it in all rows if `ban_id` >= 0.
        ban_id: token to leave out (the mask id); -1 for none.
    """
    if logits.device.type == "cpu" and numba is not None and logits.shape[0] > 0:
        return _token_stats_numba(logits, need_entropy, need_margin, banned, ban_id)
    rows = max(1, _SLICE // max(1, logits.shape[1]))
    if logits.shape[0] <= rows:
        return token_stats_reference(logits, need_entropy, need_margin, banned, ban_id)
    parts = [
        token_stats_reference(
            logits[first : first + rows],
            need_entropy,
            need_margin,
            None if banned is None else banned[first : first + rows],
            ban_id,
        )
        for first in range(0, logits.shape[0], rows)
    ]
    return TokenStats(*map(_joined, *parts))  # type: ignore[arg-type]


def _joined(*parts: torch.Tensor | None) -> torch.Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None


def token_stats_reference(
    logits: torch.Tensor,
    need_entropy: bool = False,
    need_margin: bool = False,
    banned: torch.Tensor | None = None,
    ban_id: int = -1,
) -> TokenStats:
    """`token_stats` in plain torch, with float32 copies of all of `logits`."""
    logits = forbid(logits.float(), banned, ban_id)
    best, argmax = logits.max(dim=1)
    if ban_id == 0:  # nothing else competes in a row of -inf: not the banned id either
        empty = best == -torch.inf
        argmax = torch.where(empty if banned is None else empty & banned, 1, argmax)
    usable = best.isfinite()
    delta = (logits - best[:, None]).nan_to_num(nan=-torch.inf)
    weight = delta.exp()
    total = weight.sum(dim=1, dtype=torch.float64)
    logprob = torch.where(usable, -total.log(), -torch.inf)
    entropy = margin = None
    if need_entropy:
        spread = delta.clamp(min=-1e4).mul_(weight).sum(dim=1, dtype=torch.float64)
        entropy = torch.where(usable, total.log() - spread / total, 0.0).float()
    if need_margin:
        top = weight.topk(min(2, weight.shape[1]), dim=1).values.double()
        second = top[:, 1] if top.shape[1] > 1 else torch.zeros_like(total)
        margin = torch.where(usable, (1.0 - second) / total, 0.0).float()
    return TokenStats(
        argmax,
        logprob.float(),
        torch.where(usable, 1.0 / total, 0.0).float(),
        torch.where(usable, best + total.log(), best.double()),
        entropy,
        margin,
    )


def prob_of(
    logits: torch.Tensor, tokens: torch.Tensor, logsumexp: torch.Tensor
) -> torch.Tensor:
    """Untempered probability of a given token in each row.

    Args:
        logits: [N, V].
        tokens: [N] int64; must not be a banned token.
        logsumexp: [N], `TokenStats.logsumexp` of the same logits.

    Returns:
        [N] float32; 0 where the logit is NaN or the row has no finite maximum.
    """
    chosen = logits.gather(1, tokens[:, None])[:, 0].double()
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


# --- CPU ------------------------------------------------------------------------
#
# The kernel works on the bits of float32 or bfloat16 logits: as integers they compare
# in the order of the numbers, which LLVM vectorises, and NaN, which it does not, is
# mapped to -inf on the way. Threads are started per call: numba's own pools break
# engines that fork later, or compete with torch's.


def _token_stats_numba(
    logits: torch.Tensor,
    need_entropy: bool,
    need_margin: bool,
    banned: torch.Tensor | None,
    ban_id: int,
) -> TokenStats:
    num_rows, vocab = logits.shape
    if logits.dtype not in (torch.float32, torch.bfloat16):
        logits = logits.float()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    stride, wide = logits.stride(0), logits.dtype == torch.float32
    flat = logits.detach().as_strided(((num_rows - 1) * stride + vocab,), (1,))
    bits = flat.view(torch.int32 if wide else torch.int16).numpy()
    bans = np.full(num_rows, ban_id, dtype=np.int64)
    if banned is not None:
        bans[~banned.numpy()] = -1
    argmax = np.empty(num_rows, dtype=np.int64)
    logsumexp = np.empty(num_rows, dtype=np.float64)
    floats = np.empty((4, num_rows), dtype=np.float32)

    shift = np.int32(0 if wide else 16)
    results = (argmax, logsumexp, floats)

    def work(first: int, last: int) -> None:
        if first > 0 and sys.platform == "linux":
            os.sched_setaffinity(0, _cpus())
        _stats(
            bits, shift, vocab, stride, bans, first, last, need_margin, *results
        )  # fmt: skip

    num_threads = min(
        torch.get_num_threads(), num_rows, 1 + logits.numel() // _WORTH_A_THREAD
    )
    cuts = [num_rows * i // num_threads for i in range(num_threads + 1)]
    threads = [
        threading.Thread(target=work, args=(cuts[i], cuts[i + 1]))
        for i in range(1, num_threads)
    ]
    for thread in threads:
        thread.start()
    work(cuts[0], cuts[1])
    for thread in threads:
        thread.join()
    logprob, confidence, entropy, margin = torch.from_numpy(floats).unbind()
    return TokenStats(
        torch.from_numpy(argmax),
        logprob,
        confidence,
        torch.from_numpy(logsumexp),
        entropy if need_entropy else None,
        margin if need_margin else None,
    )


@functools.cache
def _cpus() -> frozenset[int]:
    """The CPUs of all our threads: OpenMP may have bound this one to a single CPU."""
    cpus: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            cpus |= os.sched_getaffinity(int(thread))
    return frozenset(cpus)


def _jit(fastmath: set[str]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        if numba is None:
            return function
        try:
            return numba.njit(nogil=True, cache=True, fastmath=fastmath)(function)
        except RuntimeError:  # neither the package nor the user's cache is writable
            return numba.njit(nogil=True, fastmath=fastmath)(function)

    return decorate


_EXACT = _jit(fastmath={"contract"})
# Sums may be reordered, into vector lanes; NaN and infinity keep their meaning.
_REORDERED = _jit(fastmath={"contract", "reassoc"})


@_EXACT
def _ordered(bits: Any) -> Any:
    """Float32 bits -> int32 in the order of the numbers; -0 is 0, NaN is -inf."""
    magnitude = np.int32(bits & np.int32(0x7FFFFFFF))
    if magnitude > np.int32(0x7F800000):
        return np.int32(-0x7F800000)
    return np.int32(-magnitude) if bits < 0 else magnitude


@_EXACT
def _exp(x: Any) -> Any:
    """exp of a float32 in [-87, 0] within 2 ulp (Cephes' polynomial), vectorisable."""
    power = np.int32(x * np.float32(1.44269504) - np.float32(0.5))  # rounds: x <= 0
    rest = x - np.float32(power) * np.float32(0.693359375)
    rest = rest + np.float32(power) * np.float32(2.12194440e-4)
    value = np.float32(1.9875691500e-4)
    value = value * rest + np.float32(1.3981999507e-3)
    value = value * rest + np.float32(8.3334519073e-3)
    value = value * rest + np.float32(4.1665795894e-2)
    value = value * rest + np.float32(1.6666665459e-1)
    value = value * rest + np.float32(5.0000001201e-1)
    value = value * rest * rest + rest + np.float32(1.0)
    scale = np.int32((power + np.int32(127)) << np.int32(23))
    return value * scale.view(np.float32)


@_REORDERED
def _largest(bits: Any, shift: Any, first: int, last: int) -> Any:
    best = np.int32(-0x80000000)
    for i in range(first, last):
        best = np.int32(max(best, _ordered(np.int32(np.int32(bits[i]) << shift))))
    return best


@_REORDERED
def _sums(bits: Any, shift: Any, first: int, last: int, top: Any) -> Any:
    """Sums of exp(d) and d exp(d) for d = logit - top."""
    total, spread = np.float32(0.0), np.float32(0.0)
    for i in range(first, last):
        delta = np.int32(np.int32(bits[i]) << shift).view(np.float32) - top
        counts = delta > np.float32(-87.0)  # false for NaN; less adds nothing
        delta = delta if counts else np.float32(-87.0)
        weight = _exp(delta) if counts else np.float32(0.0)
        total += weight
        spread += delta * weight
    return total, spread


@_EXACT
def _stats(
    bits: Any,
    shift: Any,
    vocab: int,
    stride: int,
    bans: Any,
    first_row: int,
    last_row: int,
    need_margin: bool,
    argmax: Any,
    logsumexp: Any,
    floats: Any,
) -> None:
    num_chunks = (vocab + _CHUNK - 1) // _CHUNK
    lowest = np.int32(-0x80000000)
    for row in range(first_row, last_row):
        logits = bits[row * stride : row * stride + vocab]
        ban = bans[row]
        best, start = lowest, 0
        runner_up = lowest  # the largest of the other chunks' maxima
        for chunk in range(num_chunks):
            first, last = chunk * _CHUNK, min(vocab, (chunk + 1) * _CHUNK)
            if first <= ban < last:
                left = _largest(logits, shift, first, ban)
                right = _largest(logits, shift, ban + 1, last)
                found = max(left, right)
            else:
                found = _largest(logits, shift, first, last)
            if found > best:
                runner_up = best
                best, start = found, first
            elif found > runner_up:
                runner_up = found
        token = start
        while token == ban or _ordered(np.int32(np.int32(logits[token]) << shift)) != (
            best
        ):
            token += 1
        argmax[row] = token
        top_bits = np.int32(-best) | np.int32(-0x80000000) if best < 0 else best
        top = np.int32(top_bits).view(np.float32)
        if not np.isfinite(top):
            logsumexp[row] = top
            floats[0, row] = -np.inf
            floats[1:, row] = 0.0
            continue
        total, spread = 0.0, 0.0
        for chunk in range(num_chunks):
            first, last = chunk * _CHUNK, min(vocab, (chunk + 1) * _CHUNK)
            if first <= ban < last:
                parts = _sums(logits, shift, first, ban, top)
                total += parts[0]
                spread += parts[1]
                first = ban + 1
            parts = _sums(logits, shift, first, last, top)
            total += parts[0]
            spread += parts[1]
        logsumexp[row] = top + math.log(total)
        floats[0, row] = -math.log(total)
        floats[1, row] = 1.0 / total
        floats[2, row] = math.log(total) - spread / total
        if need_margin:
            for i in range(start, min(vocab, start + _CHUNK)):
                if i != token and i != ban:
                    value = _ordered(np.int32(np.int32(logits[i]) << shift))
                    runner_up = max(runner_up, value)
            second = 0.0
            if runner_up > np.int32(-0x7F800000):
                second_bits = (
                    np.int32(-runner_up) | np.int32(-0x80000000)
                    if runner_up < 0
                    else runner_up
                )
                delta = np.int32(second_bits).view(np.float32) - top
                second = math.exp(delta)
            floats[3, row] = (1.0 - second) / total
