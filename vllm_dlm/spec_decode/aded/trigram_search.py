# SPDX-License-Identifier: Apache-2.0
"""ADED's loops: weights that adapt, and the search for a chain (arXiv 2407.12021).

Compiled by numba; without it they run as they are, and take a hundred times as long.
They are in one file because numba's cache on disk sees changes in it only. Tables and
learned weights come as tuples of arrays: `trigram_table.TrigramTable` and
`drafting.Learned`.
"""

from __future__ import annotations

import math

import numpy as np

from vllm_dlm.kernels.numba_jit import jit

_compiled = jit(error_model="numpy")

_EXPLORATION = 32.0
"""c1: how much the weights count against what was found below a node."""
_EXPLORATION_GROWTH = 8.0
"""c2: visits after which c1 begins to grow."""
PRIME = 2147483647
"""Modulus of the multiplicative congruential generator of the roll-outs' noise."""
_UNEXPANDED = -1


@_compiled
def score(total, visits, weight, parent_visits):  # type: ignore[no-untyped-def]
    """What a visited child is worth: the mean of what was found, and its weight."""
    growth = math.log((parent_visits + _EXPLORATION_GROWTH + 1.0) / _EXPLORATION_GROWTH)
    prior = weight * math.sqrt(parent_visits) / (1.0 + visits)
    return total / visits + (_EXPLORATION + growth) * prior


@_compiled
def _slot(keys, first, second):  # type: ignore[no-untyped-def]
    """Find a pair's place in the hash map, or the free place where it belongs."""
    key = (int(first) << 32) | int(second)
    # No product exceeds 63 bits: the same numbers with numba and without.
    mixed = (int(first) * 0x9E3779B1) ^ (int(second) * 0x85EBCA6B)
    slot = (mixed ^ (mixed >> 29)) & (len(keys) - 1)
    while keys[slot] != -1 and keys[slot] != key:
        slot = (slot + 1) & (len(keys) - 1)
    return slot


@_compiled
def move(keys, heads, new_keys, new_heads):  # type: ignore[no-untyped-def]
    for slot in range(len(keys)):
        key = keys[slot]
        if key != -1:
            place = _slot(new_keys, key >> 32, key & 0xFFFFFFFF)
            new_keys[place] = key
            new_heads[place] = heads[slot]


@_compiled
def keep(learned, kept, since):  # type: ignore[no-untyped-def]
    """Copy the entries that have gained since a gain, to arrays with room for them."""
    for slot in range(len(learned.keys)):
        key = learned.keys[slot]
        entry, last = learned.heads[slot] if key != -1 else -1, -1
        while entry >= 0:
            if learned.gains[entry] >= since:
                place = kept.sizes[1]
                kept.sizes[1] += 1
                kept.tokens[place] = learned.tokens[entry]
                kept.weights[place] = learned.weights[entry]
                kept.gains[place] = learned.gains[entry]
                kept.links[place] = -1
                if last >= 0:
                    kept.links[last] = place
                else:
                    new = _slot(kept.keys, key >> 32, key & 0xFFFFFFFF)
                    kept.keys[new] = key
                    kept.heads[new] = place
                    kept.sizes[0] += 1
                last = place
            entry = learned.links[entry]


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
def learn(table, learned, text, begin, increment, cap, most):  # type: ignore[no-untyped-def]
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
        learned.gains[entry] = learned.sizes[2]
        learned.sizes[2] += 1


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
def successors(table, learned, first, second, tokens, weights):  # type: ignore[no-untyped-def]
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
def _roll_out(table, learned, first, second, steps, noise, tokens, weights):  # type: ignore[no-untyped-def]
    """Follow successors drawn by their weights: what they weigh, and the next noise.

    `tokens` and `weights` are room to work in.
    """
    value = 0.0
    for _ in range(steps):
        found = successors(table, learned, first, second, tokens, weights)
        if found == 0:
            break
        noise = noise * 48271 % PRIME
        chosen = _drawn(weights[:found], noise / PRIME)
        value += weights[chosen]
        first, second = second, tokens[chosen]
    return value, noise


@_compiled
def _follow(table, learned, first, second, chain, length, tokens, weights):  # type: ignore[no-untyped-def]
    """Fill a chain from `length` on with the heaviest successors; its length then."""
    while length < len(chain):
        if successors(table, learned, first, second, tokens, weights) == 0:
            break
        first, second = second, tokens[0]
        chain[length] = second
        length += 1
    return length


@_compiled
def search(  # type: ignore[no-untyped-def]
    table, learned, first, second, depth, iterations, top_k, seed, chain
):
    """Write the chain that follows a pair, and return its length.

    Nodes are numbered as they come, the children of a node side by side, heaviest
    first. A node is expanded when it is first visited, the root before.
    """
    most = 1 + top_k * (iterations + 1)
    tokens, weights = np.empty(most, np.int32), np.empty(most, np.float64)
    totals, visits = np.empty(most, np.float64), np.empty(most, np.int64)
    begins, counts = np.empty(most, np.int64), np.empty(most, np.int64)
    room = np.empty(top_k, np.int32), np.empty(top_k, np.float64)
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
            end = used + top_k
            found = successors(
                table,
                learned,
                before,
                tokens[node],
                tokens[used:end],
                weights[used:end],
            )
            begins[node], counts[node] = used, found
            for child in range(used, used + found):
                totals[child], visits[child] = 0.0, 0
                counts[child] = _UNEXPANDED
            used += found
        if iteration == 0:  # that was the root
            if counts[0] == 0:
                return 0
            continue
        more, noise = _roll_out(
            table, learned, before, tokens[node], depth - level, noise, *room
        )
        for visited in path[: level + 1]:
            totals[visited] += value + more
            visits[visited] += 1
    node, length, before, last = 0, 0, first, second
    while length < len(chain) and counts[node] > 0:
        children = visits[begins[node] : begins[node] + counts[node]]
        best = np.argmax(children)
        if children[best] == 0:
            break
        node = begins[node] + best
        before, last = last, tokens[node]
        chain[length] = last
        length += 1
    return _follow(table, learned, before, last, chain, length, *room)
