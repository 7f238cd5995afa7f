# SPDX-License-Identifier: Apache-2.0
"""Bad words in a canvas: no order of writing, alone or in parallel, completes one."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dlm.model_executor.sampling.bad_words import MASKED, BadWords

VOCAB = 3
words = st.lists(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3), min_size=1, max_size=5
)


def contains(tokens, word) -> bool:
    return any(
        list(tokens[i : i + len(word)]) == list(word)
        for i in range(len(tokens) - len(word) + 1)
    )


def test_single_tokens_are_told_apart():
    words = BadWords([[2], [5, 6], [1], [2]])
    assert words.single == [1, 2]
    assert words.banned([MASKED, 5, MASKED], 0) == [(2, 6)]
    assert words.vetoed([MASKED, 5], {0: 2}) == [0]


@pytest.mark.parametrize(
    ("tokens", "banned"),
    [
        ([5, MASKED, 7], [(1, 6)]),
        ([MASKED, 6, 7], [(0, 5)]),
        ([5, 6, MASKED], [(2, 7)]),
        ([5, MASKED, MASKED], []),
        ([6, 7], []),
        ([MASKED, 7], []),
    ],
)
def test_any_token_of_a_word_may_come_last(tokens, banned):
    assert BadWords([[5, 6, 7]]).banned(tokens, 0) == banned


def test_a_written_token_could_become_a_word_too():
    assert BadWords([[5, 6]]).banned([5, 9], 0) == [(1, 6)]


def test_positions_before_the_block_are_of_no_interest():
    words = BadWords([[1, 2], [2, 1]])
    assert words.banned([MASKED, 1, MASKED], 1) == [(2, 2)]
    assert words.banned([MASKED, 1, MASKED], 0) == [(0, 2), (2, 2)]


def test_a_word_reaches_as_far_as_it_is_long():
    assert BadWords([[4], [1, 2, 3, 4]]).reach == 3
    assert BadWords([[4]]).reach == 0


def test_of_tokens_written_together_the_rightmost_gives_way():
    words = BadWords([[5, 6]])
    assert words.vetoed([MASKED, MASKED, 9], {0: 5, 1: 6}) == [1]
    assert words.vetoed([MASKED, MASKED, 9], {0: 6, 1: 5}) == []


def test_who_gives_way_leaves_no_other_word():
    """What an edit would have replaced stays, and the step's other tokens see it."""
    words = BadWords([[3, 2], [3, 4], [2, 7]])
    assert words.vetoed([1, 2], {0: 3, 1: 4}) == [0]
    assert words.vetoed([3, 1, MASKED], {1: 4, 2: 7}) == [1]
    assert words.vetoed([3, 2, MASKED], {2: 7}) == [2]


def test_words_that_stand_there_already_are_no_ones_fault():
    """A prompt's, say, or those of a text that was appended (tccf)."""
    assert BadWords([[5, 6]]).vetoed([5, 6, MASKED], {2: 7}) == []


def dense(words, tokens, begin) -> list[tuple[int, int]]:
    """`banned`, word by word and token by token."""
    several = [word for word in words if len(word) > 1]
    found = set()
    for position in range(begin, len(tokens)):
        for token in range(VOCAB):
            after = [*tokens[:position], token, *tokens[position + 1 :]]
            for word in several:
                for start in range(position - len(word) + 1, position + 1):
                    if start >= 0 and after[start : start + len(word)] == word:
                        found.add((position, token))
    return sorted(found)


@given(
    words=words,
    tokens=st.lists(st.integers(MASKED, VOCAB - 1), min_size=1, max_size=7),
    begin=st.integers(0, 7),
)
def test_banned_is_what_completes_a_word(words, tokens, begin):
    assert BadWords(words).banned(tokens, begin) == dense(words, tokens, begin)


@given(words=words, seed=st.integers(0, 1 << 30), length=st.integers(1, 6))
def test_no_bad_word_is_ever_written(words, seed, length):
    """By tokens that are banned nothing, nor by those that stale bans let through."""
    rng = random.Random(seed)
    bad = BadWords(words)
    tokens = [MASKED] * length
    for _ in range(3 * length):
        banned = set(bad.banned(tokens, 0))
        fresh, writes = [], {}
        for position, token in enumerate(tokens):
            allowed = [
                t
                for t in range(VOCAB)
                if t not in bad.single and (position, t) not in banned
            ]
            if rng.random() < 0.3:  # an edit, or a token chosen in an earlier step
                writes[position] = rng.randrange(VOCAB)
            elif token == MASKED and allowed and rng.random() < 0.7:
                writes[position] = rng.choice(allowed)
                fresh.append(position)
        withdrawn = bad.vetoed(tokens, writes)
        assert set(withdrawn) <= set(writes)
        if len(fresh) == len(writes) > 0:
            assert len(withdrawn) < len(writes)  # progress
        for position, token in writes.items():
            if position not in withdrawn:
                tokens[position] = token
        assert not any(contains(tokens, word) for word in words)
