# SPDX-License-Identifier: Apache-2.0
"""Bad words in a canvas: no order of writing, alone or in parallel, completes one."""

import random

from hypothesis import given
from hypothesis import strategies as st

from vllm_dlm.model_executor.bad_words import banned_tokens, vetoed

VOCAB = 3
words = st.lists(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3), min_size=1, max_size=3
)


def contains(tokens, word) -> bool:
    return any(
        list(tokens[i : i + len(word)]) == list(word)
        for i in range(len(tokens) - len(word) + 1)
    )


def test_a_single_token_is_banned_everywhere():
    assert banned_tokens([None, 1, None], [[2]], 0) == [(0, 2), (2, 2)]


def test_any_token_of_a_word_may_come_last():
    assert banned_tokens([5, None, 7], [[5, 6, 7]], 0) == [(1, 6)]
    assert banned_tokens([None, 6, 7], [[5, 6, 7]], 0) == [(0, 5)]
    assert banned_tokens([5, 6, None], [[5, 6, 7]], 0) == [(2, 7)]
    assert banned_tokens([5, None, None], [[5, 6, 7]], 0) == []


def test_positions_before_the_block_are_of_no_interest():
    assert banned_tokens([None, 1, None], [[2]], 1) == [(2, 2)]


def test_of_tokens_written_together_the_rightmost_gives_way():
    assert vetoed([None, None, 9], {0: 5, 1: 6}, [[5, 6]]) == [1]
    assert vetoed([None, None, 9], {0: 5, 1: 6}, [[6, 5]]) == []


@given(words=words, seed=st.integers(0, 1 << 30), length=st.integers(1, 6))
def test_no_bad_word_is_ever_written(words, seed, length):
    rng = random.Random(seed)
    tokens: list[int | None] = [None] * length
    for _ in range(3 * length):
        banned = set(banned_tokens(tokens, words, 0))
        writes = {}
        for position, token in enumerate(tokens):
            allowed = [t for t in range(VOCAB) if (position, t) not in banned]
            if token is None and allowed and rng.random() < 0.7:
                writes[position] = rng.choice(allowed)
        withdrawn = vetoed(tokens, writes, words)
        assert not writes or len(set(withdrawn)) < len(writes)  # progress
        for position, token in writes.items():
            if position not in withdrawn:
                tokens[position] = token
        known = [-1 if token is None else token for token in tokens]
        assert not any(contains(known, word) for word in words)
