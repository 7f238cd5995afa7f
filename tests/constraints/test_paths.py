# SPDX-License-Identifier: Apache-2.0
"""Paths against all texts of small automata, by brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from constraints.path_cases import (
    END,
    PAIRS,
    ROWS,
    TOKENS,
    A,
    B,
    C,
    check,
    expected,
    parts_of,
    problem_of,
    problems,
    texts,
)
from hypothesis import given
from hypothesis import strategies as st

from vllm_dlm.constraints.automaton import compile_pattern
from vllm_dlm.constraints.paths import (
    OPEN,
    Completions,
    Drawing,
    Graph,
    Problem,
    feasible,
    possible,
    solve,
    unread,
    walk,
)
from vllm_dlm.constraints.vocabulary import Vocabulary

EXAMPLES = {
    "nothing written": (
        3,
        [OPEN] * 3,
        0,
        [A, B, END],
        [
            [0.3571, 0, 0.4286, 0.2143, 0],
            [0.2571, 0.3571, 0.2143, 0.1071, 0.0643],
            [0, 0.2571, 0.1357, 0.1357, 0.4714],
        ],
    ),
    "the last one is b": (
        3,
        [OPEN, OPEN, 1],
        0,
        [C, A, -1],
        [[0, 0, 0.6667, 0.3333, 0], [1, 0, 0, 0, 0]],
    ),
    "one token behind": (
        2,
        [OPEN] * 2,
        1,
        [A, B],
        [[0.2941, 0, 0.4706, 0.2353, 0], [0.3529, 0.2941, 0.1765, 0.0882, 0.0882]],
    ),
    "nothing behind": (
        2,
        [OPEN] * 2,
        0,
        None,
        [[0.4545, 0, 0.3636, 0.1818, 0], [0, 0.4545, 0.2727, 0.1364, 0.1364]],
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples(name: str):
    count, fixed, rest, path, rows = EXAMPLES[name]
    logits = np.log(ROWS[:count])
    problem = problem_of(logits, PAIRS, fixed, PAIRS.min_length <= rest)
    solution = solve(problem)
    assert solution.found
    if path is not None:
        assert solution.tokens.tolist() == path
    by_class = np.array([problem.parts[..., 2]])[0]
    for i, row in enumerate(rows):
        share = np.exp(logits[i] - problem.parts[i, PAIRS.class_of, 0])
        share /= by_class[i, PAIRS.class_of]
        tokens = solution.classes[i, PAIRS.class_of] * share
        np.testing.assert_allclose(tokens, row, atol=6e-5)
    check(solution, logits, PAIRS, problem)


@given(problems())
def test_against_all_texts(case):
    logits, machine, problem = case
    check(solve(problem), logits, machine, problem)


@given(problems(), st.data())
def test_tokens_in_place_of_written_ones_go_together(case, data):
    """Any of them, along with any part of the path, leave a text that matches."""
    logits, machine, problem = case
    written = problem.fixed != OPEN
    problem = replace(problem, reread=written)
    found = solve(problem)
    if not found.found:
        return
    check(found, logits, machine, replace(problem, reread=None))
    base = found.tokens.copy()
    for i in written.nonzero()[0]:
        members = (machine.class_of == problem.fixed[i]).nonzero()[0].tolist()
        base[i] = data.draw(st.sampled_from(members))
        before, after = found.states[i], found.states[i + 1]
        weights = {
            token: np.exp(logits[i, token])
            for token in range(logits.shape[1])
            if machine.class_of[token] >= 0
            and machine.transitions[before, machine.class_of[token]] == after
            and logits[i, token] > -np.inf
        }
        if not weights:
            assert found.tokens[i] == -1
            continue
        best = max(weights, key=lambda token: (weights[token], -token))
        assert logits[i, found.tokens[i]] == logits[i, best]
        total = sum(weights.values())
        if total > 0:
            share = weights[found.tokens[i]] / total
            assert found.confidence[i] == pytest.approx(share, abs=1e-9)
    for taken in itertools.product([False, True], repeat=len(base)):
        text = np.where(np.array(taken) & (found.tokens >= 0), found.tokens, base)
        state = walk(machine, problem.start, text)
        assert state >= 0 and problem.end[state]


@given(problems(), st.integers(0, 99))
def test_the_most_probable_path_is_found_beside_a_drawn_one(case, seed):
    logits, machine, problem = case
    noise = np.random.default_rng(seed).gumbel(size=logits.shape)
    noisy = parts_of(logits + noise, machine)
    scores, tokens = noisy[..., 0].copy(), noisy[..., 1].copy()
    own = np.where(scores > -np.inf, tokens, 0).astype(np.int64)
    with np.errstate(divide="ignore"):
        weights = problem.parts[..., 0] + np.log(problem.parts[..., 2])
    drawing = Drawing(weights, scores, tokens, np.take_along_axis(logits, own, axis=1))
    plain = solve(problem)
    assert plain.best.tolist() == plain.tokens.tolist()
    both = solve(replace(problem, drawing=drawing, also_best=True))
    assert both.found == plain.found
    if both.found:
        assert both.best.tolist() == plain.best.tolist()
        drawn = solve(replace(problem, drawing=drawing))
        assert both.tokens.tolist() == drawn.tokens.tolist()
        assert both.states.tolist() == drawn.states.tolist()
        # The weights are those that are measured.
        assumed = solve(replace(problem, drawing=drawing._replace(weights=None)))
        assert assumed.tokens.tolist() == drawn.tokens.tolist()
        assert assumed.confidence.tolist() == drawn.confidence.tolist()


@given(problems())
def test_in_order_each_token_is_the_best_that_leaves_a_text(case):
    logits, machine, problem = case
    found = solve(replace(problem, in_order=True))
    fixed = problem.fixed.tolist()
    left = [
        text
        for text in texts(machine, fixed, problem.end, problem.start)
        if all(k != OPEN or logits[i, text[i]] > -np.inf for i, k in enumerate(fixed))
    ]
    assert found.found == bool(left)
    for i in range(len(fixed)) if left else ():
        tokens = {text[i] for text in left}
        best = min(tokens, key=lambda token, i=i: (-logits[i, token], token))
        if fixed[i] == OPEN:
            assert found.tokens[i] == best
            left = [text for text in left if text[i] == best]


@given(problems())
def test_feasible_classes_are_those_of_some_text(case):
    logits, machine, problem = case
    usable = np.where(np.isfinite(logits), 0.0, -np.inf)
    _, _, posterior = expected(
        usable, machine, problem.fixed.tolist(), problem.end, problem.start
    )
    found = feasible(
        problem.graph,
        problem.start,
        problem.end,
        problem.fixed,
        problem.parts[..., 0] > -np.inf,
    )
    for i, klass in np.ndindex(found.shape):
        if problem.fixed[i] == OPEN:
            is_taken = posterior[i, machine.class_of == klass].sum() > 0
            assert found[i, klass] == is_taken


def test_a_model_that_is_sure_of_another_text_is_no_overflow():
    """Every position is as good as impossible; the path is there all the same."""
    count = 64
    logits = np.full((count, 5), 0.0)
    logits[:, B] = 700.0
    problem = problem_of(logits, PAIRS, [OPEN] * count, PAIRS.min_length <= 0)
    solution = solve(problem)
    assert solution.found and solution.tokens[:2].tolist() == [A, B]
    assert walk(PAIRS, 0, solution.tokens) in (1, 3)
    # b and a take turns: that is the only way to have b at every second position.
    np.testing.assert_allclose(solution.confidence, 1.0)


def test_ties_go_to_the_lowest_token():
    logits = np.zeros((2, 5))
    problem = problem_of(logits, PAIRS, [OPEN] * 2, PAIRS.min_length <= 0)
    assert solve(problem).tokens.tolist() == [A, B]


def test_positions_that_are_not_read_count_all_classes_alike():
    problem = problem_of(np.log(ROWS), PAIRS, [OPEN] * 3, PAIRS.min_length <= 0)
    parts = problem.parts.copy()
    parts[1] = unread(1, parts.shape[1])
    solution = solve(Problem(problem.graph, 0, problem.end, problem.fixed, parts))
    assert solution.found
    # a, then b and c, ab or the end; or c or ab, and any but b.
    weights = {
        (0, 1): 0.5 * (0.1 + 0.1 + 0.3),
        (2, 0): 0.3 * 0.3,
        (2, 2): 0.3 * (0.2 + 0.3),
        (2, 3): 0.3 * 0.3,
    }
    total = sum(weights.values())
    first = [sum(w for k, w in weights.items() if k[0] == c) / total for c in (0, 2)]
    np.testing.assert_allclose(solution.classes[0, [0, 2]], first)


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [3, 1])
def test_draws_have_the_joint_distribution(at_once: int):
    """20,000 texts of the first worked example, by chi-square.

    Written at once, or token by token in random order, from rows that stay the same.
    """
    draws, generator = 20_000, np.random.default_rng(3)
    logits = np.log(ROWS)
    problem = problem_of(logits, PAIRS, [OPEN] * 3, PAIRS.min_length <= 0)
    weights = problem.parts[..., 0] + np.log(problem.parts[..., 2])

    def drawn(fixed: np.ndarray) -> np.ndarray:
        best = parts_of(logits + generator.gumbel(size=logits.shape), PAIRS)
        # Whole arrays, as an engine has: others would be a type to compile for.
        scores, tokens = best[..., 0].copy(), best[..., 1].copy()
        own = np.take_along_axis(logits, tokens.astype(np.int64), axis=1)
        drawing = Drawing(weights, scores, tokens, own)
        return solve(replace(problem, fixed=fixed, drawing=drawing)).tokens

    counts: dict[tuple[int, ...], int] = {}
    for _ in range(draws):
        text, fixed = np.zeros(3, dtype=np.int64), np.full(3, OPEN)
        for place in generator.permutation(3):
            if (fixed != OPEN).all():
                break
            found = drawn(fixed)
            written = (fixed == OPEN) if at_once == 3 else np.arange(3) == place
            text[written] = found[written]
            fixed[written] = PAIRS.class_of[text[written]]
        counts[tuple(text.tolist())] = counts.get(tuple(text.tolist()), 0) + 1
    chances = {
        text: np.prod([ROWS[i, t] for i, t in enumerate(text)])
        for text in texts(PAIRS, [OPEN] * 3, problem.end, 0)
    }
    total = sum(chances.values())
    assert total == pytest.approx(0.14)
    assert counts.keys() <= chances.keys()
    square = sum(
        (counts.get(text, 0) - draws * p / total) ** 2 / (draws * p / total)
        for text, p in chances.items()
    )
    # 18 degrees of freedom: more than 42.3 in one run of a thousand.
    assert len(chances) == 19 and square < 42.3


@given(problems(), st.integers(0, 4), st.data())
def test_completions_are_those_of_all_texts(case, shortest, data):
    _, machine, problem = case
    count = len(problem.fixed)
    completions = Completions(
        machine, problem.graph, count, shortest, pins=problem.fixed
    )
    position = data.draw(st.integers(0, count))
    is_end = machine.class_of == machine.end_class
    for state in range(len(machine.transitions)):
        completed = any(
            not any(is_end[t] for i, t in enumerate(text) if position + i < shortest)
            for text in texts(
                machine,
                problem.fixed[position:].tolist(),
                machine.accepting,
                state,
            )
        )
        # Classes without a token are no way on for a text; they are for the rows.
        if completed:
            assert completions.at(position)[state]


def test_nothing_is_compiled_while_a_request_waits():
    """Arrays that are read-only, as those of automata are, have a type of their own."""
    from vllm_dlm.constraints import path_loops, paths

    paths.rehearse()
    machine = compile_pattern("(ab|c)+", Vocabulary.of_tokens(TOKENS), [END])
    logits, graph = np.log(ROWS), Graph.of(machine)
    parts = parts_of(logits, machine)
    fixed = np.full(3, OPEN)
    for end in (machine.accepting, machine.min_length <= 1):
        solve(Problem(graph, machine.start, end, fixed, parts))
        feasible(graph, machine.start, end, fixed, parts[..., 0] > -1)
        possible(machine, graph, fixed, 1, end)
    Completions(machine, graph, 5, 2)
    compiled = [f for f in vars(path_loops).values() if hasattr(f, "signatures")]
    assert len(compiled) > 5
    assert {len(function.signatures) for function in compiled} == {1}
