# SPDX-License-Identifier: Apache-2.0
"""ADED: tri-grams draft, and adapt to the text; a tree search picks the chain.

From "Adaptive Draft-Verification for Efficient Large Language Model Decoding" (arXiv
2407.12021) and its public code. There, a tree of drafts is verified at once; vLLM
verifies one chain, so the most visited path is drafted, which accepts less. Weights
adapt per request, so that no request's drafts depend on another's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_dlm.spec_decode.aded import trigram_search
from vllm_dlm.spec_decode.aded.trigram_table import TrigramTable
from vllm_dlm.spec_decode.options import Aded


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
        self._learned = Learned(
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
            trigram_search.move(learned.keys, learned.heads, keys, heads)
            learned = learned._replace(keys=keys, heads=heads)
        self._learned = learned


def _longer(array: np.ndarray, size: int) -> np.ndarray:
    longer = np.empty(size, array.dtype)
    longer[: len(array)] = array
    return longer
