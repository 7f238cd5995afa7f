# SPDX-License-Identifier: Apache-2.0
"""ADED: tri-grams draft, and adapt to the text; a tree search picks the chain.

From "Adaptive Draft-Verification for Efficient Large Language Model Decoding" (arXiv
2407.12021) and its public code. There, a tree of drafts is verified at once; vLLM
verifies one chain, so the most visited path is drafted, which accepts less. What texts
have taught lies in a `Memory`, of one request or of several, whose size is bounded.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_dlm.spec_decode.aded import trigram_search
from vllm_dlm.spec_decode.aded.trigram_table import TrigramTable
from vllm_dlm.spec_decode.options import Aded

MEMORY_SIZE = 1_000_000
"""Tri-grams of a shared memory where the user names no number; some 50 MB."""


class Learned(NamedTuple):
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
    gains: np.ndarray
    """[E] int64: number of the entry's last gain of weight, in the order of gains."""
    sizes: np.ndarray
    """[3] int64: pairs and entries in use, gains of weight so far."""


class Memory:
    """A table, and what texts have taught beside it.

    A pair keeps its `top_k` heaviest learned successors. A memory of bounded size
    forgets, when it is full, the half of its tri-grams that gained longest ago.
    """

    def __init__(
        self, table: TrigramTable, options: Aded, size: int | None = None
    ) -> None:
        """Start with nothing learned.

        Args:
            table: of a corpus, or an empty one.
            options: of the method.
            size: most learned tri-grams, at least 2; None for as many as come.
        """
        self.table = table
        self.options = options
        self.size = size
        self._learned = _empty(64, 32)

    @property
    def num_learned(self) -> int:
        """Learned tri-grams."""
        return int(self._learned.sizes[1])

    def learn(self, text: np.ndarray, begin: int) -> None:
        """Add the increment to the tri-grams of a text, [n] int32, from one place on.

        Args:
            begin: place of the first tri-gram's last token, 2 or more. Of more than
                half the memory's size, only the last tri-grams count.
        """
        if self.size is not None:
            begin = max(begin, len(text) - self.size // 2)
        self._reserve(len(text) - begin)
        trigram_search.learn(
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
        found = trigram_search.search(
            self.table,
            self._learned,
            int(text[-2]),
            int(text[-1]),
            options.depth,
            options.iterations,
            options.top_k,
            (options.seed + len(text)) % (trigram_search.PRIME - 1) + 1,
            chain,
        )
        return chain[:found].tolist()

    def successors(self, first: int, second: int) -> list[tuple[int, float]]:
        """Tokens that follow a pair and their weights, the `top_k` heaviest."""
        tokens = np.empty(self.options.top_k, np.int32)
        weights = np.empty(self.options.top_k, np.float64)
        found = trigram_search.successors(
            self.table, self._learned, first, second, tokens, weights
        )
        return list(zip(tokens[:found].tolist(), weights[:found].tolist(), strict=True))

    def _reserve(self, more: int) -> None:
        """Make room for as many new pairs and entries."""
        if self.size is not None and self.num_learned + more > self.size:
            self._forget()
        learned = self._learned
        pairs, entries = map(int, learned.sizes[:2])
        if entries + more > len(learned.tokens):
            size = max(2 * len(learned.tokens), entries + more)
            if self.size is not None:
                size = min(size, self.size)
            learned = learned._replace(
                tokens=_longer(learned.tokens, size),
                weights=_longer(learned.weights, size),
                links=_longer(learned.links, size),
                gains=_longer(learned.gains, size),
            )
        if 2 * (pairs + more) > len(learned.keys):
            size = 1 << (2 * (pairs + more)).bit_length()
            keys, heads = np.full(size, -1, np.int64), np.empty(size, np.int32)
            trigram_search.move(learned.keys, learned.heads, keys, heads)
            learned = learned._replace(keys=keys, heads=heads)
        self._learned = learned

    def _forget(self) -> None:
        """Keep the half of the size that has gained last."""
        assert self.size is not None
        learned, most = self._learned, self.size // 2
        count = self.num_learned
        if count <= most:
            return
        since = np.partition(learned.gains[:count], count - most)[count - most]
        kept = _empty(len(learned.keys), len(learned.tokens))
        kept.sizes[2] = learned.sizes[2]
        trigram_search.keep(learned, kept, since)
        self._learned = kept


class AdaptiveTrigrams:
    """One request's text, and the memory that it teaches and is drafted for from.

    Each round, every tri-gram among the last `window` tokens gains `increment`, up to
    `cap`; weights are not normalised again.
    """

    def __init__(
        self, table: TrigramTable, options: Aded, memory: Memory | None = None
    ) -> None:
        """Begin with no token seen; the memory is the request's own by default."""
        self.memory = memory or Memory(table, options)
        self.options = options
        self.num_seen = 0
        """Tokens of the text in the last round."""
        self.best_chain = self.memory.best_chain
        self.successors = self.memory.successors

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
        if begin < len(text) and self.options.increment:
            self.memory.learn(text, begin)


def _empty(pairs: int, entries: int) -> Learned:
    """Nothing learned, and room for less than so many pairs, and for the entries."""
    return Learned(
        keys=np.full(pairs, -1, np.int64),
        heads=np.empty(pairs, np.int32),
        tokens=np.empty(entries, np.int32),
        weights=np.empty(entries, np.float32),
        links=np.empty(entries, np.int32),
        gains=np.empty(entries, np.int64),
        sizes=np.zeros(3, np.int64),
    )


def _longer(array: np.ndarray, size: int) -> np.ndarray:
    longer = np.empty(size, array.dtype)
    longer[: len(array)] = array
    return longer
