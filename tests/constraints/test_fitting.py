# SPDX-License-Identifier: Apache-2.0
"""Texts with holes: whether a match can be completed, against trying all texts."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dlm.constraints.automaton import compile_pattern
from vllm_dlm.constraints.fitting import HOLE, first_misfit
from vllm_dlm.constraints.vocabulary import Vocabulary

LETTERS = Vocabulary.of_tokens([b"a", b"b", b"ab", b""])
END = 3


def accepts(pattern: str, text: tuple[int, ...]) -> bool:
    automaton = compile_pattern(pattern, LETTERS, [END])
    state = automaton.start
    for token in text:
        kind = automaton.class_of[token]
        state = automaton.transitions[state, kind] if min(state, kind) >= 0 else -1
    return state >= 0 and bool(automaton.accepting[state])


@given(
    st.sampled_from(["(ab|b)+", "a{2,3}", "(?:ab){1,2}a?", "b*a"]),
    st.lists(st.sampled_from([HOLE, HOLE, 0, 1, 2, END]), min_size=1, max_size=4),
    st.integers(0, 4),
)
@settings(max_examples=30, deadline=None)
def test_as_by_trying_all_texts(
    pattern: str, tokens: list[int], ends_from: int
) -> None:
    choices = [
        [token] if token != HOLE else range(3 if i < ends_from else 4)
        for i, token in enumerate(tokens)
    ]
    fits = any(accepts(pattern, text) for text in product(*choices))
    automaton = compile_pattern(pattern, LETTERS, [END])
    assert (first_misfit(automaton, tokens, ends_from) is None) == fits


@pytest.mark.parametrize(
    ("pattern", "tokens", "place"),
    [
        ("a+", [HOLE, 1, HOLE], 1),
        ("a+", [0, HOLE, 0], None),
        ("aab", [HOLE, HOLE, HOLE, HOLE, 1], 3),
        ("a{5}", [HOLE, 0, HOLE], 3),
        ("ab", [2, HOLE], None),
    ],
)
def test_the_first_place_is_named(
    pattern: str, tokens: list[int], place: int | None
) -> None:
    automaton = compile_pattern(pattern, LETTERS, [END])
    last = max((i for i, token in enumerate(tokens) if token != HOLE), default=-1)
    assert first_misfit(automaton, tokens, last + 1) == place
