# SPDX-License-Identifier: Apache-2.0
"""Draws of tokens: the largest of logits with Gumbel noise, which is a hash.

The noise of a token is MurmurHash3 (x86, 32 bits) of the request's seed, the position
and the token's id, as in vLLM's Triton kernels: a seed draws the same text on a CPU as
on a GPU, up to the last digit of a logarithm, whoever shares the batch.
"""

import math

import numpy as np
import torch

from vllm_dlm.kernels.numba_jit import jit

_jit = jit()

_WORD = 0xFFFFFFFF
_SECOND_HALF = 0x9E3779B9
"""Start of the hash for the higher 32 of 64 random bits."""
_ACCEPTANCE = 0x7F4A7C15
"""Start of the hash for acceptance tests: no noise is drawn from it."""
_DRAFTING = 1 << 30
"""Added to the position of a draft, whose noise must not be the verification's."""
_SMALLEST = 2.0**-24


def _gumbel_sample_kernel(
    local_argmax_ptr: torch.Tensor,
    local_argmax_stride: int,
    local_max_ptr: torch.Tensor,
    local_max_stride: int,
    logits_cache_ptr: torch.Tensor | None,
    logits_cache_stride_0: int,
    logits_cache_stride_1: int,
    logits_cache_col_ptr: torch.Tensor | None,
    logits_cache_source_ptr: torch.Tensor | None,
    logits_cache_source_stride: int,
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    seeds_ptr: torch.Tensor,
    pos_ptr: torch.Tensor,
    temp_ptr: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
    IS_DRAFTING: bool,
    APPLY_TEMPERATURE: bool,
    USE_FP64: bool,
    PER_TOKEN_COL: bool,
) -> None:
    """The best token of each block of the vocabulary, with noise where it is drawn.

    Args:
        local_argmax_ptr: int64 `[rows, blocks]`, written; local_max_ptr: float, same.
        logits_cache_ptr: `[max_num_reqs, columns, vocab_size]` or None, gets the rows
            of logits_cache_source_ptr at column logits_cache_col_ptr, which is one
            number, or one for each row.
        logits_ptr: `[rows, vocab_size]`; expanded_idx_mapping_ptr: `[rows]`, negative
            for rows of no request, which are greedy.
        seeds_ptr: int64 `[max_num_reqs]`; pos_ptr: `[rows]`.
        temp_ptr: float32 `[max_num_reqs]`.
    """
    slots = expanded_idx_mapping_ptr
    if logits_cache_ptr is not None:
        assert logits_cache_col_ptr is not None and logits_cache_source_ptr is not None
        kept = slots >= 0
        columns = logits_cache_col_ptr.expand(len(slots))[kept]
        logits_cache_ptr[slots[kept], columns, :vocab_size] = logits_cache_source_ptr[
            kept
        ]
    best_tokens(
        local_argmax_ptr,
        local_max_ptr,
        logits_ptr,
        slots,
        seeds_ptr,
        pos_ptr,
        temp_ptr,
        BLOCK_SIZE,
        is_drafting=IS_DRAFTING,
        divide=APPLY_TEMPERATURE,
    )


def best_tokens(
    tokens: torch.Tensor,
    scores: torch.Tensor,
    logits: torch.Tensor,
    slots: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperatures: torch.Tensor,
    block: int,
    *,
    is_drafting: bool = False,
    divide: bool = False,
) -> None:
    """The best token of each block of each row, and its score; NaN counts as -inf.

    Args:
        tokens: int64 `[rows, blocks]`, written; of equals the first.
        scores: float `[rows, blocks]`, written; float64 takes finer noise.
        logits: `[rows, vocab]`; slots: `[rows]`, negative for greedy rows.
        seeds, temperatures: `[max_num_reqs]`; positions: `[rows]`.
        divide: whether logits are yet to be divided by the temperature.
    """
    _best_tokens(
        tokens.numpy(),
        scores.numpy(),
        logits.float().numpy(),
        slots.numpy(),
        seeds.numpy(),
        positions.numpy(),
        temperatures.numpy(),
        block,
        _DRAFTING if is_drafting else 0,
        divide,
        scores.dtype == torch.float64,
    )


def acceptance_draws(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Float32 `[rows]` in (0, 1): what a draft's probability is compared with.

    Args:
        seeds, positions: int64 `[rows]`.
    """
    draws = np.empty(len(seeds), np.float32)
    _acceptance_draws(draws, seeds.numpy(), positions.numpy())
    return torch.from_numpy(draws)


@_jit
def _rotated(value, bits):  # type: ignore[no-untyped-def]
    return ((value << bits) | (value >> (32 - bits))) & _WORD


@_jit
def _mixed(state, word):  # type: ignore[no-untyped-def]
    word = (word * 0xCC9E2D51) & _WORD
    word = (_rotated(word, 15) * 0x1B873593) & _WORD
    return (_rotated(state ^ word, 13) * 5 + 0xE6546B64) & _WORD


@_jit
def _prefix(seed, position, start):  # type: ignore[no-untyped-def]
    state = _mixed(start, seed & _WORD)
    state = _mixed(state, (seed >> 32) & _WORD)
    return _mixed(state, position & _WORD)


@_jit
def _hashed(prefix, token):  # type: ignore[no-untyped-def]
    state = _mixed(prefix, token) ^ 16  # bytes
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & _WORD
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & _WORD
    return state ^ (state >> 16)


@_jit
def _best_tokens(  # type: ignore[no-untyped-def]
    tokens,
    scores,
    logits,
    slots,
    seeds,
    positions,
    temperatures,
    block,
    shift,
    divide,
    wide,
):
    vocab = logits.shape[1]
    for row in range(logits.shape[0]):
        slot = slots[row]
        temperature = temperatures[slot] if slot >= 0 else np.float32(0.0)
        low = high = 0
        if temperature != 0:
            seed, position = seeds[slot], positions[row] + shift
            low = _prefix(seed, position, 0)
            high = _prefix(seed, position, _SECOND_HALF)
        for place in range(tokens.shape[1]):
            begin = place * block
            best, best_score = begin, -np.inf
            for token in range(begin, min(begin + block, vocab)):
                score = np.float64(logits[row, token])
                if temperature != 0:
                    if divide:
                        score = np.float64(np.float32(score) / temperature)
                    bits = np.float64(_hashed(low, token))
                    if wide:
                        upper = np.float64(_hashed(high, token))
                        lower = np.floor(bits / 2048)
                        u = (upper * 2097152 + lower + 0.5) * 2.0**-53
                        score -= math.log(-math.log(min(u, 1 - 2.0**-53)))
                    else:
                        u = np.float64(np.float32((bits + 0.5) * 2.0**-32))
                        score -= math.log(-math.log(max(1 - u, _SMALLEST)))
                if score > best_score:
                    best, best_score = token, score
            tokens[row, place] = best
            scores[row, place] = best_score


@_jit
def _acceptance_draws(draws, seeds, positions):  # type: ignore[no-untyped-def]
    for row in range(draws.shape[0]):
        bits = _hashed(_prefix(seeds[row], positions[row], _ACCEPTANCE), 0)
        draws[row] = (np.float64(bits >> 8) + 0.5) * 2.0**-24
