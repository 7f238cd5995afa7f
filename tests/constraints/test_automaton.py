# SPDX-License-Identifier: Apache-2.0
"""Patterns as automata over tokens: against `re.fullmatch`, on all short texts."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest
from constraints.random_cases import patterns
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dlm.constraints.automaton import (
    UNBOUNDED,
    Automaton,
    ConstraintError,
    compile_pattern,
)
from vllm_dlm.constraints.limits import Limits
from vllm_dlm.constraints.syntax import parse, write
from vllm_dlm.constraints.vocabulary import Vocabulary

LETTERS = Vocabulary.of_tokens([b"a", b"b", b"c", b"ab", b""])
BYTES = Vocabulary.of_tokens({byte: bytes([byte]) for byte in range(256)}, 257)


def end_of(automaton: Automaton, tokens: list[int]) -> int:
    """The state behind some tokens, or -1."""
    state = automaton.start
    for token in tokens:
        kind = automaton.class_of[token]
        state = automaton.transitions[state, kind] if min(state, kind) >= 0 else -1
    return int(state)


def texts(letters: str, longest: int) -> list[str]:
    return [
        "".join(each)
        for length in range(longest + 1)
        for each in product(letters, repeat=length)
    ]


def test_the_worked_example() -> None:
    """Section 7 of the design: `a` and `ab` are no class, `c` and `ab` are."""
    automaton = compile_pattern("(ab|c)+", LETTERS, [4])
    a, b, c, ab, end = automaton.class_of
    assert c == ab and len({a, b, c, end}) == 4
    assert automaton.transitions.shape == (4, 4)
    match = end_of(automaton, [2])
    behind_a = end_of(automaton, [0])
    assert automaton.min_length[[0, match, behind_a]].tolist() == [1, 0, 1]
    assert automaton.max_length[[0, match, behind_a]].tolist() == [UNBOUNDED] * 3
    # A text that matches may go on.
    allowed = automaton.transitions[match] >= 0
    assert allowed[[a, c, end]].all() and not allowed[b]
    assert end_of(automaton, [2, 4]) == automaton.end_state
    assert end_of(automaton, [2, 4, 4]) == automaton.end_state
    assert end_of(automaton, [2, 4, 2]) == end_of(automaton, [0, 4]) == -1


@pytest.mark.parametrize(
    ("pattern", "states", "lengths"),
    [(r"\d{3}", 5, (3, 3)), ("é", 4, (2, 2)), ("a{2,}", 4, (2, UNBOUNDED))],
)
def test_single_bytes(pattern: str, states: int, lengths: tuple[int, int]) -> None:
    automaton = compile_pattern(pattern, BYTES, [256])
    assert len(automaton.transitions) == states
    assert (automaton.min_length[0], automaton.max_length[0]) == lengths


def compile_or_none(pattern: str, vocabulary: Vocabulary) -> Automaton | None:
    """None where no text of the vocabulary matches."""
    try:
        return compile_pattern(pattern, vocabulary, [vocabulary.size - 1])
    except ConstraintError:
        return None


@given(patterns)
@settings(max_examples=30, deadline=None)
def test_short_texts_match_as_in_python(pattern: str) -> None:
    """All sequences of up to four tokens; the tree that is written again as well."""
    automaton = compile_or_none(pattern, LETTERS)
    again = compile_or_none(write(parse(pattern)), LETTERS)
    rule = re.compile(pattern, re.ASCII)
    for length in range(5):
        for tokens in product(range(4), repeat=length):
            text = "".join(["a", "b", "c", "ab"][token] for token in tokens)
            expected = rule.fullmatch(text) is not None
            for each in (automaton, again):
                state = -1 if each is None else end_of(each, list(tokens))
                assert (state >= 0 and bool(each.accepting[state])) == expected, text


@given(patterns)
@settings(max_examples=30, deadline=None)
def test_lengths_are_those_of_a_search(pattern: str) -> None:
    """Fewest and most tokens to a match, by trying all ways state by state."""
    automaton = compile_or_none(pattern, LETTERS)
    if automaton is None:
        return
    moves = automaton.transitions[:, : automaton.end_class]
    states = len(moves)
    lengths: list[set[int]] = [set() for _ in range(states)]
    reached = np.eye(states, dtype=bool)
    for length in range(2 * states + 1):
        for state in range(states):
            if (reached[state] & automaton.accepting).any():
                lengths[state].add(length)
        step = np.zeros_like(reached)
        for source, kind in zip(*np.nonzero(moves >= 0), strict=True):
            step[source, moves[source, kind]] = True
        reached = reached @ step
    for state in range(states):
        assert lengths[state], "a state from which no match is reached"
        assert automaton.min_length[state] == min(lengths[state])
        longest = max(lengths[state])
        expected = UNBOUNDED if longest > states else longest
        assert automaton.max_length[state] == expected


@pytest.mark.parametrize("pattern", [r"[^é-ü]x?", r"[à-ÿ€-₿😀-🙏]+", r".{1,2}", r"\W"])
def test_characters_of_several_bytes(pattern: str) -> None:
    automaton = compile_pattern(pattern, BYTES, [256])
    rule = re.compile(pattern, re.ASCII)
    borders = "\0 \n\x7f\x80é\xe8ü\xff\u07ff\u0800€₿\ud7ff\ue000\uffff😀🙏\U0010ffff"
    for text in texts(borders, 2):
        state = end_of(automaton, list(text.encode()))
        matches = state >= 0 and bool(automaton.accepting[state])
        assert matches == (rule.fullmatch(text) is not None), repr(text)
    # What is no UTF-8 does not match: half a character, a surrogate, a long form.
    for data in (b"\xc3", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80"):
        state = end_of(automaton, list(data))
        assert state < 0 or not automaton.accepting[state]


@given(
    st.lists(st.binary(max_size=4), min_size=1, max_size=30),
    st.sampled_from(["[ab]+c?", r"\w{0,3}", "(?:é|a.)*", "[^a]{2,3}"]),
)
@settings(max_examples=30, deadline=None)
def test_classes_are_what_a_walk_of_each_token_says(
    tokens: list[bytes], pattern: str
) -> None:
    """Two tokens are one class exactly if they do the same in all states."""
    vocabulary = Vocabulary.of_tokens([*tokens, b""])
    bytewise = compile_pattern(pattern, BYTES, [256])
    automaton = compile_or_none(pattern, vocabulary)
    if automaton is None:
        return
    # The states of both, side by side, from the start on.
    pairs = {0: 0}
    waiting = [0]
    does: dict[int, list[int]] = {}
    while waiting:
        state = waiting.pop()
        for token, text in enumerate(tokens):
            kind = automaton.class_of[token]
            target = int(automaton.transitions[state, kind]) if kind >= 0 else -1
            does.setdefault(token, []).append(target)
            walked = pairs[state]
            for byte in text:
                next_kind = bytewise.class_of[byte]
                if walked >= 0:
                    walked = (
                        int(bytewise.transitions[walked, next_kind])
                        if next_kind >= 0
                        else -1
                    )
            if target < 0:
                continue
            assert walked >= 0 and text
            assert automaton.accepting[target] == bytewise.accepting[walked]
            if target not in pairs:
                pairs[target] = walked
                waiting.append(target)
    for one, other in product(range(len(tokens)), repeat=2):
        same = automaton.class_of[one] == automaton.class_of[other]
        assert same == (does[one] == does[other])


def test_barred_tokens_and_several_ends() -> None:
    automaton = compile_pattern("(ab|c)+", LETTERS, [2, 4], barred=[3])
    assert automaton.class_of[2] == automaton.class_of[4] == automaton.end_class
    assert automaton.class_of[3] == -1
    assert automaton.min_length[0] == 2
    with pytest.raises(ConstraintError, match="no token may end the text"):
        compile_pattern("a", LETTERS, [4], barred=[4])
    with pytest.raises(ConstraintError, match="no token may end the text"):
        compile_pattern("a", LETTERS, [])


def test_arrays_are_read_only() -> None:
    automaton = compile_pattern("a", LETTERS, [4])
    with pytest.raises(ValueError, match="read-only"):
        automaton.transitions[0, 0] = 1
    assert automaton.num_bytes > 0


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(?=a)b", "look-around"),
        ("(?<!a)b", "look-around"),
        (r"(a)\1", "back-reference"),
        (r"(a)?(?(1)b|c)", "conditional group"),
        (r"a\b", r"\\b is not supported"),
        ("a^b", r"\^ and \$ inside"),
        ("(?:^a)*", r"\^ and \$ inside"),
        ("(?i)a", "inline flags"),
        ("(?s:a)", "inline flags"),
        ("a++", "possessive"),
        ("(?>a)b", "atomic group"),
        ("[", "unterminated character set"),
        ("a{3,2}", "min repeat greater than max"),
        (r"\p{L}", "bad escape"),
        ("d", "tokenizer cannot write any text"),
        (r"[^\x00-\U0010ffff]", "matches no text at all"),
        ("(" * 5000 + ")" * 5000, "nested too deeply|too large"),
    ],
)
def test_refusals(pattern: str, says: str) -> None:
    with pytest.raises(ConstraintError, match=says):
        compile_pattern(pattern, LETTERS, [4])


@pytest.mark.parametrize("pattern", ["^a$", "^(?:a|b)$", "(^a|^b$)", r"\Aa\Z"])
def test_anchors_of_the_whole_text_say_nothing(pattern: str) -> None:
    automaton = compile_pattern(pattern, LETTERS, [4])
    assert automaton.max_length[0] == 1


@pytest.mark.parametrize(
    ("pattern", "limits", "says"),
    [
        ("a" * 100, Limits(pattern_bytes=99), "100 bytes of text, and at most 99"),
        ("a{600}", Limits(parts=300), "parts, and at most 300"),
        ("a{30}", Limits(subsets=20), "21 states over bytes, and at most 20"),
        ("a{30}", Limits(states=20), "32 states, and at most 20"),
        ("ab?", Limits(classes=1), "3 token classes, and at most 1"),
        ("[abc]{9}", Limits(moves=9), "moves, and at most 9"),
        ("a{600}", Limits(seconds=0.0), "more than 0 seconds"),
        # What is small in writing and large in memory.
        ("(((a{99}){99}){99}){99}", Limits(), "parts, and at most"),
        ("(a|b)*a(a|b){30}", Limits(), "states over bytes, and at most"),
    ],
)
def test_limits_are_named(pattern: str, limits: Limits, says: str) -> None:
    with pytest.raises(ConstraintError, match=says):
        compile_pattern(pattern, LETTERS, [4], limits=limits)


@pytest.mark.slow
@given(patterns)
@settings(max_examples=500, deadline=None)
def test_many_patterns_match_as_in_python(pattern: str) -> None:
    test_short_texts_match_as_in_python.hypothesis.inner_test(pattern)
