# SPDX-License-Identifier: Apache-2.0
"""A pattern behind a thought: against `re.fullmatch` on all short texts."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import numpy as np
import pytest
from constraints.path_cases import parts_of

from vllm_dlm.constraints import thoughts
from vllm_dlm.constraints.automaton import (
    UNBOUNDED,
    Automaton,
    ConstraintError,
    compile_pattern,
)
from vllm_dlm.constraints.fitting import HOLE, first_misfit
from vllm_dlm.constraints.limits import Limits
from vllm_dlm.constraints.paths import OPEN, Graph, Problem, solve, walk
from vllm_dlm.constraints.thoughts import ThoughtEnd, compile_answer
from vllm_dlm.constraints.vocabulary import Vocabulary

# `</>` ends a thought; 5 reads so, and other tokens can spell it.
TOKENS = [b"a", b"b", b"<", b"/", b">", b"</>", b"ab", b"</", b""]
END, STOP = 5, 8
VOCABULARY = Vocabulary.of_tokens(TOKENS)
THOUGHT = ThoughtEnd(END, "</>")


def is_right(pattern: str, tokens: tuple[int, ...]) -> bool:
    """In words: no end is spelt in the thought, and a match is behind it."""
    if END not in tokens:
        return False
    at = tokens.index(END)
    text = b"".join(TOKENS[token] for token in tokens[:at]).decode()
    answer, stops = tokens[at + 1 :], tokens.count(STOP)
    if STOP in tokens[:at] or tokens[len(tokens) - stops :] != (STOP,) * stops:
        return False
    written = b"".join(TOKENS[token] for token in answer).decode()
    return "</>" not in text and re.fullmatch(pattern, written) is not None


@pytest.mark.parametrize("pattern", ["ab?", "(a|b)*", "a</>"])
def test_all_short_texts(pattern: str):
    automaton = compile_answer(pattern, THOUGHT, VOCABULARY, [STOP])
    assert automaton.end_class == automaton.transitions.shape[1] - 1
    for length in range(5):
        for tokens in product(range(len(TOKENS)), repeat=length):
            state = walk(automaton, automaton.start, np.array(tokens, np.int64))
            matches = state >= 0 and bool(automaton.accepting[state])
            assert matches == is_right(pattern, tokens), tokens


@pytest.mark.parametrize("seed", range(6))
def test_a_canvas_in_any_order(seed: int):
    """Whichever positions come first, what comes out is a thought and a match."""
    random = np.random.default_rng(seed)
    automaton = compile_answer("ab?|(b|ab){2}", THOUGHT, VOCABULARY, [STOP])
    tokens = np.full(7, -1)
    while (tokens < 0).any():
        logits = random.normal(size=(len(tokens), len(TOKENS))) * 2
        fixed = np.where(tokens < 0, OPEN, automaton.class_of[tokens])
        numbers = parts_of(logits, automaton)
        end = automaton.min_length == 0
        solution = solve(
            Problem(Graph.of(automaton), automaton.start, end, fixed, numbers)
        )
        assert solution.found
        written = (tokens < 0) & (random.random(len(tokens)) < 0.4)
        tokens[written] = solution.tokens[written]
    assert is_right("ab?|(b|ab){2}", tuple(tokens.tolist()))


def test_lengths():
    automaton = compile_answer("(a|b){2,3}", THOUGHT, VOCABULARY, [STOP])
    # The end of the thought, and `ab`; the thought has any length.
    assert automaton.min_length[automaton.start] == 1 + 1
    assert automaton.max_length[automaton.start] == UNBOUNDED
    inside = walk(automaton, automaton.start, np.array([0, 0, 0, END]))
    assert automaton.max_length[inside] == 3
    # A canvas with pinned tokens: the thought's end is where it still can be.
    assert first_misfit(automaton, [HOLE, HOLE, HOLE, 0, 1], 5) is None
    assert first_misfit(automaton, [HOLE, HOLE, 2], 3) == 3


def test_without_a_thought_it_is_the_pattern():
    plain = compile_pattern("ab?", VOCABULARY, [STOP])
    found = compile_answer("ab?", None, VOCABULARY, [STOP])
    assert np.array_equal(plain.transitions, found.transitions)


def test_a_token_that_is_no_text():
    """A special token, which no pattern takes, ends thoughts as well."""
    vocabulary = Vocabulary.of_tokens({0: b"a", 1: b"", 2: b""}, 3)
    automaton = compile_answer("a+", ThoughtEnd(1, "</think>"), vocabulary, [2])
    state = walk(automaton, automaton.start, np.array([0, 0, 1, 0, 2]))
    assert state == automaton.end_state
    assert walk(automaton, automaton.start, np.array([0, 1, 1])) == -1


def test_refusals():
    for forbidden in ({"barred": [END]}, {"end_ids": [END, STOP]}):
        given = {"end_ids": [STOP], **forbidden}
        with pytest.raises(ConstraintError, match="'</>' ends the thought in front"):
            compile_answer("a", THOUGHT, VOCABULARY, **given)
    with pytest.raises(ConstraintError, match="too large: it needs"):
        compile_answer(
            "a{30}", THOUGHT, VOCABULARY, [STOP], limits=Limits(states=32, classes=99)
        )


def test_the_thought_is_compiled_once_for_all_patterns(
    monkeypatch: pytest.MonkeyPatch,
):
    compiled = []

    def counting(pattern: str, *more: Any) -> Automaton:
        compiled.append(pattern)
        return compile_pattern(pattern, *more)

    monkeypatch.setattr(thoughts, "compile_pattern", counting)
    vocabulary = Vocabulary.of_tokens(TOKENS)
    for pattern in ("a+", "b+", "(ab)*"):
        compile_answer(pattern, THOUGHT, vocabulary, [STOP])
    free = compiled[1]
    assert compiled == ["a+", free, "b+", "(ab)*"]
    # Where other tokens may be written, or others end it, it is another one.
    compile_answer("b+", THOUGHT, vocabulary, [STOP], barred=[0])
    compile_answer("a+", ThoughtEnd(4, ">"), vocabulary, [STOP])
    assert len(compiled) == 8 and compiled[5] == free != compiled[7]
