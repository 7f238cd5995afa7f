# SPDX-License-Identifier: Apache-2.0
"""ADED: tri-grams draft, and adapt to the text; a tree search picks the chain.

From "Adaptive Draft-Verification for Efficient Large Language Model Decoding" (arXiv
2407.12021) and its public code. There, a tree of drafts is verified at once; vLLM
verifies one chain, so the most visited path is drafted, which accepts less. Weights
adapt per request, so that no request's drafts depend on another's.

The loops are compiled by numba; without it they run as they are, some hundred times
slower. They are in one file because numba's cache on disk sees changes in it only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vllm_dlm.spec_decode.options import Aded
from vllm_dlm.spec_decode.trigram_table import TrigramTable

try:
    import numba
except ImportError:  # the extra "cpu" is not installed
    numba = None

F = TypeVar("F", bound=Callable[..., Any])


def _compiled(function: F) -> F:
    if numba is None:
        return function
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package nor the user's cache is writable
        return numba.njit(**options)(function)


class _Learned(NamedTuple):
    """Weights that differ from the table's: a hash map of pairs to linked lists."""

    keys: np.ndarray
    """[S] int64, S a power of 2: first << 32 | second; -1 is free."""
    heads: np.ndarray
    """[S] int32: first entry of the pair's list."""
    tokens: np.ndarray
    """[E] int32, successor of each entry."""
    weights: np.ndarray
    """[E] float32."""
    links: np.ndarray
    """[E] int32: the pair's next entry, -1 behind the last."""
    sizes: np.ndarray
    """[2] int64: pairs and entries in use."""


class AdaptiveTrigrams:
    """One request's view of a table: what its own text says weighs more.

    Each round, every tri-gram among the last `window` tokens gains `increment`, up to
    `cap`; weights are not normalised again. A pair keeps its `top_k` heaviest learned
    successors.
    """

    def __init__(self, table: TrigramTable, options: Aded) -> None:
        self.table = table
        self.options = options
        self.num_seen = 0
        """Tokens of the text in the last round."""
        self._learned = _Learned(
            keys=np.full(64, -1, np.int64),
            heads=np.empty(64, np.int32),
            tokens=np.empty(32, np.int32),
            weights=np.empty(32, np.float32),
            links=np.empty(32, np.int32),
            sizes=np.zeros(2, np.int64),
        )

    def observe(self, text: np.ndarray) -> None:
        """A round has ended with this text, [n] int32, which starts as the last did.

        Tri-grams that came since the last round count even where they are further
        back than the window, the prompt's in the first round if `learn_prompt`.
        """
        windowed = len(text) - self.options.window + 2
        begin = max(windowed, 2)
        if self.num_seen or self.options.learn_prompt:
            begin = max(min(windowed, self.num_seen), 2)
        self.num_seen = len(text)
        if begin >= len(text) or not self.options.increment:
            return
        self._reserve(len(text) - begin)
        _learn(
            self.table,
            self._learned,
            text,
            begin,
            float(self.options.increment),
            float(self.options.cap),
            self.options.top_k,
        )

    def best_chain(self, text: np.ndarray, length: int) -> list[int]:
        """At most `length` tokens to follow a text, [n] integer, n at least 2."""
        options = self.options
        chain = np.empty(length, np.int32)
        found = _search(
            self.table,
            self._learned,
            int(text[-2]),
            int(text[-1]),
            options.depth,
            options.iterations,
            options.top_k,
            (options.seed + len(text)) % (_PRIME - 1) + 1,
            chain,
        )
        return chain[:found].tolist()

    def successors(self, first: int, second: int) -> list[tuple[int, float]]:
        """Tokens that follow a pair and their weights, the `top_k` heaviest."""
        tokens = np.empty(self.options.top_k, np.int32)
        weights = np.empty(self.options.top_k, np.float64)
        found = _successors(self.table, self._learned, first, second, tokens, weights)
        return list(zip(tokens[:found].tolist(), weights[:found].tolist(), strict=True))

    def _reserve(self, more: int) -> None:
        """Make room for as many new pairs and entries."""
        learned = self._learned
        pairs, entries = map(int, learned.sizes)
        if entries + more > len(learned.tokens):
            size = max(2 * len(learned.tokens), entries + more)
            learned = learned._replace(
                tokens=_longer(learned.tokens, size),
                weights=_longer(learned.weights, size),
                links=_longer(learned.links, size),
            )
        if 2 * (pairs + more) > len(learned.keys):
            size = 1 << (2 * (pairs + more)).bit_length()
            keys, heads = np.full(size, -1, np.int64), np.empty(size, np.int32)
            _move(learned.keys, learned.heads, keys, heads)
            learned = learned._replace(keys=keys, heads=heads)
        self._learned = learned


def _longer(array: np.ndarray, size: int) -> np.ndarray:
    longer = np.empty(size, array.dtype)
    longer[: len(array)] = array
    return longer


# --- Compiled ----------------------------------------------------------------------

_EXPLORATION = 32.0
"""c1: how much the weights count against what was found below a node."""
_EXPLORATION_GROWTH = 8.0
"""c2: visits after which c1 begins to grow."""
_PRIME = 2147483647
"""Of the roll-outs' noise, a multiplicative congruential generator."""
_UNEXPANDED = -1


@_compiled
def score(total, visits, weight, parent_visits):  # type: ignore[no-untyped-def]
    """What a visited child is worth: the mean of what was found, and its weight."""
    growth = math.log((parent_visits + _EXPLORATION_GROWTH + 1.0) / _EXPLORATION_GROWTH)
    prior = weight * math.sqrt(parent_visits) / (1.0 + visits)
    return total / visits + (_EXPLORATION + growth) * prior


@_compiled
def _slot(keys, first, second):  # type: ignore[no-untyped-def]
    """Where a pair is in the hash map, or the free place where it belongs."""
    key = (int(first) << 32) | int(second)
    # No product exceeds 63 bits: the same numbers with numba and without.
    mixed = (int(first) * 0x9E3779B1) ^ (int(second) * 0x85EBCA6B)
    slot = (mixed ^ (mixed >> 29)) & (len(keys) - 1)
    while keys[slot] != -1 and keys[slot] != key:
        slot = (slot + 1) & (len(keys) - 1)
    return slot


@_compiled
def _move(keys, heads, new_keys, new_heads):  # type: ignore[no-untyped-def]
    for slot in range(len(keys)):
        key = keys[slot]
        if key != -1:
            place = _slot(new_keys, key >> 32, key & 0xFFFFFFFF)
            new_keys[place] = key
            new_heads[place] = heads[slot]


@_compiled
def _pair(table, first, second):  # type: ignore[no-untyped-def]
    """Number of a pair in the table, -1 if it is not there."""
    if first < 0 or first >= len(table.firsts) - 1:
        return -1
    low, end = table.firsts[first], table.firsts[first + 1]
    high = end
    while low < high:
        middle = (low + high) >> 1
        if table.seconds[middle] < second:
            low = middle + 1
        else:
            high = middle
    return low if low < end and table.seconds[low] == second else -1


@_compiled
def _table_weight(table, first, second, token):  # type: ignore[no-untyped-def]
    pair = _pair(table, first, second)
    if pair >= 0:
        for place in range(table.starts[pair], table.starts[pair + 1]):
            if table.tokens[place] == token:
                return table.weights[place]
    return np.float32(0.0)


@_compiled
def _learn(table, learned, text, begin, increment, cap, most):  # type: ignore[no-untyped-def]
    """Add to the weights of the tri-grams that end at `begin` or later."""
    vocab = len(table.firsts) - 1
    for end in range(begin, len(text)):
        first, second, token = text[end - 2], text[end - 1], text[end]
        # Placeholders of other media lie outside the vocabulary.
        if min(first, second, token) < 0 or max(first, second, token) >= vocab:
            continue
        slot = _slot(learned.keys, first, second)
        if learned.keys[slot] == -1:
            learned.keys[slot] = (int(first) << 32) | int(second)
            learned.heads[slot] = -1
            learned.sizes[0] += 1
        entry, count, lightest = learned.heads[slot], 0, -1
        while entry >= 0 and learned.tokens[entry] != token:
            if lightest < 0 or learned.weights[entry] <= learned.weights[lightest]:
                lightest = entry
            count += 1
            entry = learned.links[entry]
        if entry < 0:
            if count < most:
                entry = learned.sizes[1]
                learned.sizes[1] += 1
                learned.links[entry] = learned.heads[slot]
                learned.heads[slot] = entry
            else:
                entry = lightest
            learned.tokens[entry] = token
            learned.weights[entry] = _table_weight(table, first, second, token)
        heavier = float(learned.weights[entry]) + increment
        learned.weights[entry] = min(heavier, cap)


@_compiled
def _insert(token, weight, tokens, weights, filled):  # type: ignore[no-untyped-def]
    """Keep the heaviest, earlier ones first among equals; how many there are then."""
    if filled == len(tokens):
        if weight <= weights[filled - 1]:
            return filled
        filled -= 1
    place = filled
    while place > 0 and weights[place - 1] < weight:
        tokens[place] = tokens[place - 1]
        weights[place] = weights[place - 1]
        place -= 1
    tokens[place] = token
    weights[place] = weight
    return filled + 1


@_compiled
def _successors(table, learned, first, second, tokens, weights):  # type: ignore[no-untyped-def]
    """Write the heaviest successors of a pair, at most as many as fit.

    Among equals, the one learned last comes first.
    """
    filled = 0
    slot = _slot(learned.keys, first, second)
    head = learned.heads[slot] if learned.keys[slot] != -1 else -1
    entry = head
    while entry >= 0:
        filled = _insert(
            learned.tokens[entry], learned.weights[entry], tokens, weights, filled
        )
        entry = learned.links[entry]
    pair = _pair(table, first, second)
    if pair >= 0:
        for place in range(table.starts[pair], table.starts[pair + 1]):
            token = table.tokens[place]
            entry = head
            while entry >= 0 and learned.tokens[entry] != token:
                entry = learned.links[entry]
            if entry < 0:
                filled = _insert(token, table.weights[place], tokens, weights, filled)
    return filled


@_compiled
def _best_child(begin, count, totals, visits, weights, parent_visits):  # type: ignore[no-untyped-def]
    best, best_score = begin, -np.inf
    for child in range(begin, begin + count):
        if visits[child] == 0:
            return child
        found = score(totals[child], visits[child], weights[child], parent_visits)
        if found > best_score:
            best, best_score = child, found
    return best


@_compiled
def _drawn(weights, share):  # type: ignore[no-untyped-def]
    """The place at which the weights add up to more than a share of their sum."""
    rest = 0.0
    for weight in weights:
        rest += weight
    rest *= share
    place = 0
    while place < len(weights) - 1 and rest >= weights[place]:
        rest -= weights[place]
        place += 1
    return place


@_compiled
def _search(  # type: ignore[no-untyped-def]
    table, learned, first, second, depth, iterations, top_k, seed, chain
):
    """Write the chain that follows a pair; returns its length.

    Nodes are numbered as they come, children of a node side by side, heaviest first.
    A node is expanded when it is first visited, the root before.
    """
    most = 1 + top_k * (iterations + 1)
    tokens, weights = np.empty(most, np.int32), np.empty(most, np.float64)
    totals, visits = np.empty(most, np.float64), np.empty(most, np.int64)
    begins, counts = np.empty(most, np.int64), np.empty(most, np.int64)
    drawn_tokens, drawn_weights = np.empty(top_k, np.int32), np.empty(top_k, np.float64)
    path = np.empty(depth + 1, np.int64)
    tokens[0], totals[0], visits[0], counts[0] = second, 0.0, 0, _UNEXPANDED
    used, noise = 1, seed
    for iteration in range(iterations + 1):
        node, level, before, value = 0, 0, first, 1.0
        path[0] = 0
        while counts[node] > 0:
            child = _best_child(
                begins[node], counts[node], totals, visits, weights, visits[node]
            )
            before, node, level = tokens[node], child, level + 1
            path[level] = node
            value += weights[node]
        if level < depth and counts[node] == _UNEXPANDED:
            found = _successors(
                table, learned, before, tokens[node],
                tokens[used : used + top_k], weights[used : used + top_k],
            )  # fmt: skip
            begins[node], counts[node] = used, found
            for child in range(used, used + found):
                totals[child], visits[child] = 0.0, 0
                counts[child] = _UNEXPANDED
            used += found
        if iteration == 0:  # that was the root
            if counts[0] == 0:
                return 0
            continue
        token = tokens[node]
        for _ in range(level, depth):
            found = _successors(
                table, learned, before, token, drawn_tokens, drawn_weights
            )
            if found == 0:
                break
            noise = noise * 48271 % _PRIME
            chosen = _drawn(drawn_weights[:found], noise / _PRIME)
            value += drawn_weights[chosen]
            before, token = token, drawn_tokens[chosen]
        for visited in path[: level + 1]:
            totals[visited] += value
            visits[visited] += 1
    node, length, before, token = 0, 0, first, tokens[0]
    while length < len(chain) and counts[node] > 0:
        child = begins[node] + np.argmax(
            visits[begins[node] : begins[node] + counts[node]]
        )
        if visits[child] == 0:
            break
        node = child
        before, token = token, tokens[node]
        chain[length] = token
        length += 1
    while length < len(chain):
        found = _successors(table, learned, before, token, drawn_tokens, drawn_weights)
        if found == 0:
            break
        before, token = token, drawn_tokens[0]
        chain[length] = token
        length += 1
    return length
