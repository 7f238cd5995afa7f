# SPDX-License-Identifier: Apache-2.0
"""Bad words where tokens are written out of order.

Left to right, a bad word is avoided by banning its last token after its first ones.
In a canvas any token of the word may come last, and several may come in one step:
so every position is banned the tokens that would complete a word around it, and of
tokens written together the rightmost gives way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

MASKED = -1
"""Stands for a token that is not written yet."""


class BadWords:
    """The bad words of one request.

    A token is looked up by a neighbour of its in the words, so that the number of
    words hardly matters.

    Args:
        words: as token ids; none is empty.
    """

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        unique = {tuple(word) for word in words}
        self.single = sorted(word[0] for word in unique if len(word) == 1)
        """Words of one token, which nothing has to complete."""
        self.reach = max(map(len, unique)) - 1
        """How far from a token its word may begin."""
        self._singles = set(self.single)
        # Token to the left (or, of a word's first token, to the right) -> the words,
        # and which of their tokens stands beside it.
        self._after: dict[int, list[tuple[list[int], int]]] = defaultdict(list)
        self._before: dict[int, list[tuple[list[int], int]]] = defaultdict(list)
        for tokens in unique:
            word = list(tokens)
            for place in range(1, len(word)):
                self._after[word[place - 1]].append((word, place))
            if len(word) > 1:
                self._before[word[1]].append((word, 0))

    def banned(self, tokens: list[int], begin: int) -> list[tuple[int, int]]:
        """(position, token) pairs that would complete a word of several tokens.

        Args:
            tokens: of the output, `MASKED` where there is none.
            begin: first position of interest.
        """
        return [
            (position, token)
            for position in range(begin, len(tokens))
            for token in sorted(self._completing(tokens, position))
        ]

    def vetoed(self, tokens: list[int], writes: Mapping[int, int]) -> list[int]:
        """Positions of `writes` to withdraw so that none completes a word.

        Args:
            tokens: as for `banned`, before the step.
            writes: position -> token that the step would write there.
        """
        tokens, withdrawn = list(tokens), []
        for position, token in sorted(writes.items()):
            if token in self._singles or token in self._completing(tokens, position):
                withdrawn.append(position)
            else:
                tokens[position] = token
        return withdrawn

    def _completing(self, tokens: list[int], position: int) -> set[int]:
        """Tokens that would complete a word of several tokens at a position."""
        found: list[tuple[list[int], int]] = []
        if position > 0:
            found += self._after.get(tokens[position - 1], ())
        if position + 1 < len(tokens):
            found += self._before.get(tokens[position + 1], ())
        completing = set()
        for word, place in found:
            start, end = position - place, position - place + len(word)
            if (
                start >= 0
                and end <= len(tokens)
                and tokens[start:position] == word[:place]
                and tokens[position + 1 : end] == word[place + 1 :]
            ):
                completing.add(word[place])
        return completing
