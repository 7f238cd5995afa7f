# SPDX-License-Identifier: Apache-2.0
"""Loops over tokens and states, in numba: what tokens do, and how far a match is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vllm_dlm.kernels.numba_jit import jit

_FIRST_HASH = np.uint64(0x9E3779B97F4A7C15)
_FACTOR = np.uint64(0xD1342543DE82EF95)
_SHIFT = np.uint64(29)


@jit()
def in_common(data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> NDArray[np.int32]:
    """How many first bytes each token has in common with the one before.

    Args:
        data: bytes of all tokens.
        offsets: [tokens + 1], where each token's bytes begin.

    Returns:
        [tokens], 0 for the first.
    """
    count = len(offsets) - 1
    shared = np.zeros(count, np.int32)
    for token in range(1, count):
        before, begin = offsets[token - 1], offsets[token]
        most = min(begin - before, offsets[token + 1] - begin)
        same = 0
        while same < most and data[before + same] == data[begin + same]:
            same += 1
        shared[token] = same
    return shared


@jit()
def walk(
    moves: NDArray[np.int32],
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    shared: NDArray[np.int32],
    first: int,
    last: int,
    hashes: NDArray[np.uint64],
) -> None:
    """Hash what each token does: the pairs of states that it leads from and to.

    All states walk at once, and tokens that begin alike walk together.

    Args:
        moves: [states, 256], -1 where a byte may not stand.
        data, offsets, shared: of a `Vocabulary`.
        first, last: which tokens.
        hashes: [tokens], written; 0 for a token that no state takes.
    """
    states = moves.shape[0]
    longest = 0
    for token in range(first, last):
        longest = max(longest, offsets[token + 1] - offsets[token])
    begun = np.empty((longest + 1, states), np.int32)
    reached = np.empty((longest + 1, states), np.int32)
    alive = np.zeros(longest + 1, np.int64)
    alive[0] = states
    for state in range(states):
        begun[0, state] = state
        reached[0, state] = state
    walked = 0
    for token in range(first, last):
        length = offsets[token + 1] - offsets[token]
        depth = min(int(shared[token]), walked)
        while depth < length and alive[depth] > 0:
            byte = data[offsets[token] + depth]
            count = 0
            for i in range(alive[depth]):
                target = moves[reached[depth, i], byte]
                if target >= 0:
                    begun[depth + 1, count] = begun[depth, i]
                    reached[depth + 1, count] = target
                    count += 1
            depth += 1
            alive[depth] = count
        walked = depth
        hashed = np.uint64(0)
        if depth == length and alive[depth] > 0:
            hashed = _FIRST_HASH
            for i in range(alive[depth]):
                pair = np.uint64(begun[depth, i]) * np.uint64(1 << 20)
                pair += np.uint64(reached[depth, i])
                hashed = (hashed ^ pair) * _FACTOR
                hashed ^= hashed >> _SHIFT
            if hashed == np.uint64(0):
                hashed = np.uint64(1)
        hashes[token] = hashed


@jit()
def fewest(moves: NDArray[np.int32], accepting: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Fewest moves from each state to an accepting one.

    Args:
        moves: [states, classes], -1 where there is no move.
        accepting: [states].

    Returns:
        [states], -1 where none is reached.
    """
    states, kinds = moves.shape
    # Where the moves to a state come from: those of state s begin at `first[s]`.
    first = np.zeros(states + 1, np.int64)
    for state in range(states):
        for kind in range(kinds):
            if moves[state, kind] >= 0:
                first[moves[state, kind] + 1] += 1
    for state in range(states):
        first[state + 1] += first[state]
    filled = first.copy()
    sources = np.empty(first[states], np.int32)
    for state in range(states):
        for kind in range(kinds):
            target = moves[state, kind]
            if target >= 0:
                sources[filled[target]] = state
                filled[target] += 1
    lengths = np.full(states, -1, np.int32)
    waiting = np.empty(states, np.int64)
    count, done = 0, 0
    for state in range(states):
        if accepting[state]:
            lengths[state] = 0
            waiting[count] = state
            count += 1
    while done < count:
        state = waiting[done]
        done += 1
        for i in range(first[state], first[state + 1]):
            source = sources[i]
            if lengths[source] < 0:
                lengths[source] = lengths[state] + 1
                waiting[count] = source
                count += 1
    return lengths


@jit()
def reachable(moves: NDArray[np.int32], live: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The live states that are reached from state 0 through live states.

    Args:
        moves: [states, classes], -1 where there is no move.
        live: [states].
    """
    states, kinds = moves.shape
    reached = np.zeros(states, np.bool_)
    waiting = np.empty(states, np.int64)
    waiting[0] = 0
    reached[0] = True
    count, done = 1, 0
    while done < count:
        state = waiting[done]
        done += 1
        for kind in range(kinds):
            target = moves[state, kind]
            if target >= 0 and live[target] and not reached[target]:
                reached[target] = True
                waiting[count] = target
                count += 1
    return reached


@jit()
def most(moves: NDArray[np.int32]) -> NDArray[np.int64]:
    """Most moves that can be made from each state.

    Args:
        moves: [states, classes], -1 where there is no move, and in states that are no
            part of the table.

    Returns:
        [states], -1 for a state that reaches a cycle.
    """
    states, kinds = moves.shape
    lengths = np.zeros(states, np.int64)
    # Depth first; 1: on the way to here, 2: done.
    mark = np.zeros(states, np.int8)
    stack = np.empty(states, np.int64)
    next_kind = np.zeros(states, np.int64)
    for root in range(states):
        if mark[root] != 0:
            continue
        stack[0] = root
        mark[root] = 1
        height = 1
        while height > 0:
            state = stack[height - 1]
            kind = next_kind[state]
            if kind == kinds:
                mark[state] = 2
                height -= 1
                if height > 0:
                    below = stack[height - 1]
                    if lengths[state] < 0 or lengths[below] < 0:
                        lengths[below] = -1
                    else:
                        lengths[below] = max(lengths[below], lengths[state] + 1)
                continue
            next_kind[state] = kind + 1
            target = moves[state, kind]
            if target < 0:
                continue
            if mark[target] == 0:
                mark[target] = 1
                stack[height] = target
                height += 1
            elif mark[target] == 1:
                # What is on the stack above the target is on the cycle, or leads there.
                lengths[state] = -1
            elif lengths[target] < 0 or lengths[state] < 0:
                lengths[state] = -1
            else:
                lengths[state] = max(lengths[state], lengths[target] + 1)
    return lengths
