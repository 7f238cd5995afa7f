# SPDX-License-Identifier: Apache-2.0
"""ADED's drafts in plain Python: dicts of weights, a tree of objects.

Weights are rounded to float32 where they are stored, as a table's are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Pair = tuple[int, int]


def corpus_weights(
    sequences: Sequence[Sequence[int]], keep: int = 12
) -> dict[Pair, list[tuple[int, float]]]:
    """Each pair's most frequent successors with their shares, heaviest first."""
    counts: dict[Pair, Counter[int]] = {}
    for tokens in sequences:
        for first, second, third in zip(tokens, tokens[1:], tokens[2:], strict=False):
            counts.setdefault((first, second), Counter())[third] += 1
    weights = {}
    for pair, found in counts.items():
        order = sorted(found, key=lambda token, found=found: (-found[token], token))
        total = found.total()
        weights[pair] = [(t, float(np.float32(found[t] / total))) for t in order[:keep]]
    return weights


@dataclass
class Node:
    """Token and weight of a step; what the search has found below it."""

    pair: Pair
    weight: float = 0.0
    visits: int = 0
    total: float = 0.0
    children: list[Node] | None = None


@dataclass
class Memory:
    """What texts have taught, of at most `size` tri-grams."""

    size: int | None = None
    learned: dict[Pair, list[list]] = field(default_factory=dict)
    """Of each pair [successor, weight], newest first."""
    gained: list[tuple[Pair, int]] = field(default_factory=list)
    """Learned tri-grams, the one that gained weight last behind all others."""

    def reserve(self, more: int) -> None:
        if self.size is None or len(self.gained) + more <= self.size:
            return
        kept = self.gained[-(self.size // 2) :]
        for pair, entries in self.learned.items():
            entries[:] = [entry for entry in entries if (pair, entry[0]) in kept]
        self.gained = kept


@dataclass
class Drafting:
    """One request: the corpus, what texts have added, and the search."""

    corpus: dict[Pair, list[tuple[int, float]]]
    window: int = 16
    increment: float = 0.04
    cap: float = 3.0
    depth: int = 4
    iterations: int = 150
    top_k: int = 24
    seed: int = 0
    memory: Memory = field(default_factory=Memory)
    seen: int = 0

    def observe(self, text: Sequence[int]) -> None:
        ends = [
            end
            for end in range(2, len(text))
            if end >= self.seen or end - 2 >= len(text) - self.window
        ]
        if self.memory.size is not None:
            ends = ends[-(self.memory.size // 2) :]
        self.memory.reserve(len(ends))
        for end in ends:
            self._add(tuple(text[end - 2 : end]), text[end])
        self.seen = len(text)

    def _add(self, pair: Pair, token: int) -> None:
        gained = self.memory.gained
        entries = self.memory.learned.setdefault(pair, [])
        entry = next((e for e in entries if e[0] == token), None)
        if entry is None:
            weight = dict(self.corpus.get(pair, [])).get(token, 0.0)
            if len(entries) < self.top_k:
                entry = [token, weight]
                entries.insert(0, entry)  # newest first
            else:
                lightest = min(e[1] for e in entries)
                entry = [e for e in entries if e[1] == lightest][-1]
                gained.remove((pair, entry[0]))
                entry[:] = [token, weight]
        if (pair, token) in gained:
            gained.remove((pair, token))
        gained.append((pair, token))
        entry[1] = float(np.float32(min(entry[1] + self.increment, self.cap)))

    def successors(self, pair: Pair) -> list[tuple[int, float]]:
        learned = [tuple(entry) for entry in self.memory.learned.get(pair, [])]
        new = {token for token, _ in learned}
        known = [c for c in self.corpus.get(pair, []) if c[0] not in new]
        return sorted(learned + known, key=lambda c: -c[1])[: self.top_k]

    def best_chain(self, text: Sequence[int], length: int) -> list[int]:
        root = Node((text[-2], text[-1]))
        self._expand(root)
        noise = (self.seed + len(text)) % 2147483646 + 1
        for _ in range(self.iterations):
            path = [root]
            while path[-1].children:
                path.append(_select(path[-1]))
            leaf = path[-1]
            if len(path) <= self.depth and leaf.children is None:
                self._expand(leaf)
            value = 1.0
            for node in path:
                value += node.weight
            pair = leaf.pair
            for _ in range(self.depth - len(path) + 1):
                found = self.successors(pair)
                if not found:
                    break
                noise = noise * 48271 % 2147483647
                token, weight = _draw(found, noise / 2147483647)
                value += weight
                pair = (pair[1], token)
            for node in path:
                node.visits += 1
                node.total += value
        chain = []
        node = root
        while node.children and max(child.visits for child in node.children):
            node = max(node.children, key=lambda child: child.visits)
            chain.append(node.pair[1])
        pair = node.pair
        while len(chain) < length and (found := self.successors(pair)):
            pair = (pair[1], found[0][0])
            chain.append(pair[1])
        return chain[:length]

    def _expand(self, node: Node) -> None:
        node.children = [
            Node((node.pair[1], token), weight)
            for token, weight in self.successors(node.pair)
        ]


def _select(parent: Node) -> Node:
    best, best_score = None, -math.inf
    for child in parent.children:
        if not child.visits:
            return child
        exploration = 32.0 + math.log((parent.visits + 9.0) / 8.0)
        prior = child.weight * math.sqrt(parent.visits) / (1.0 + child.visits)
        score = child.total / child.visits + exploration * prior
        if score > best_score:
            best, best_score = child, score
    return best


def _draw(found: list[tuple[int, float]], share: float) -> tuple[int, float]:
    rest = 0.0
    for _, weight in found:
        rest += weight
    rest *= share
    for candidate in found[:-1]:
        if rest < candidate[1]:
            return candidate
        rest -= candidate[1]
    return found[-1]
