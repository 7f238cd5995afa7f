# SPDX-License-Identifier: Apache-2.0
"""Bad words where tokens are written out of order.

Left to right, a bad word is avoided by banning its last token after its first ones.
In a canvas any token of the word may come last, and several may come in one step:
so every position is banned the token that would complete a word around it, and of
tokens written together the rightmost gives way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def _windows(
    tokens: Sequence[int | None], word: Sequence[int], position: int
) -> list[int]:
    """Starts of the windows of the word's length that hold `position`."""
    first = max(position - len(word) + 1, 0)
    last = min(position, len(tokens) - len(word))
    return list(range(first, last + 1))


def banned_tokens(
    tokens: Sequence[int | None], words: Sequence[Sequence[int]], begin: int
) -> list[tuple[int, int]]:
    """(position, token) pairs that would complete a bad word.

    Args:
        tokens: output so far, None where masked.
        words: bad words as token ids.
        begin: first position of interest.
    """
    banned = set()
    for position in range(begin, len(tokens)):
        if tokens[position] is not None:
            continue
        for word in words:
            for start in _windows(tokens, word, position):
                if all(
                    start + i == position or tokens[start + i] == token
                    for i, token in enumerate(word)
                ):
                    banned.add((position, word[position - start]))
    return sorted(banned)


def vetoed(
    tokens: Sequence[int | None],
    writes: Mapping[int, int],
    words: Sequence[Sequence[int]],
) -> list[int]:
    """Positions of `writes` to withdraw so that no bad word is written.

    Args:
        tokens: output so far, None where masked.
        writes: position -> token that a step would write at once.
        words: bad words as token ids.
    """
    after = list(tokens)
    for position, token in writes.items():
        after[position] = token
    withdrawn = []
    for word in words:
        for start in range(len(after) - len(word) + 1):
            if after[start : start + len(word)] == list(word):
                inside = [p for p in writes if start <= p < start + len(word)]
                # A single write that completes a word was banned beforehand.
                if inside:
                    position = max(inside)
                    after[position] = tokens[position]
                    withdrawn.append(position)
    return withdrawn
