# SPDX-License-Identifier: Apache-2.0
"""Small automata with logits, and what all of their texts say of them: brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import strategies as st

from vllm_dlm.constraints.automaton import Automaton
from vllm_dlm.constraints.paths import (
    OPEN,
    Graph,
    Problem,
    Solution,
    walk,
)


def automaton(class_of: list[int], transitions: list[list[int]], accepting: list[bool]):
    """An automaton whose last state is the end, and whose last class ends texts."""
    moves = np.array(transitions, dtype=np.int32)
    accepts = np.array(accepting)
    shortest = np.where(accepts, 0, 1 << 20)
    for _ in moves:
        behind = np.where(moves >= 0, shortest[moves] + 1, 1 << 20).min(axis=1)
        shortest = np.minimum(shortest, behind)
    return Automaton(
        np.array(class_of, dtype=np.int32),
        moves,
        accepts,
        shortest.astype(np.int32),
        np.full(len(moves), 1 << 30, dtype=np.int32),
        end_state=len(moves) - 1,
        end_class=moves.shape[1] - 1,
    )


A, B, C, AB, END = range(5)
TOKENS = [b"a", b"b", b"c", b"ab", b""]
PAIRS = automaton(
    # (ab|c)+ of the tokens a, b, c, ab and an end: c and ab do the same.
    [0, 1, 2, 2, 3],
    [[2, -1, 1, -1], [2, -1, 1, 3], [-1, 1, -1, -1], [-1, -1, -1, 3]],
    [False, True, False, True],
)
ROWS = np.array(
    [
        [0.5, 0.1, 0.2, 0.1, 0.1],
        [0.4, 0.2, 0.2, 0.1, 0.1],
        [0.2, 0.3, 0.1, 0.1, 0.3],
    ]
)


def parts_of(logits: np.ndarray, machine: Automaton) -> np.ndarray:
    """The numbers of each class, by plain loops."""
    num_classes = machine.transitions.shape[1]
    parts = np.zeros((len(logits), num_classes, 5))
    parts[..., [0, 4]], parts[..., 1] = -np.inf, np.inf
    for row, klass in np.ndindex(parts.shape[:2]):
        (tokens,) = (machine.class_of == klass).nonzero()
        values = logits[row, tokens]
        if len(values) and values.max() > -np.inf:
            deltas = values - values.max()
            parts[row, klass, :4] = (
                values.max(),
                tokens[values.argmax()],
                np.exp(deltas).sum(),
                (np.maximum(deltas, -1e4) * np.exp(deltas)).sum(),
            )
            parts[row, klass, 4] = np.sort(values)[-2] if len(values) > 1 else -np.inf
    return parts


def problem_of(
    logits: np.ndarray,
    machine: Automaton,
    fixed: list[int],
    end: np.ndarray,
    start: int = 0,
) -> Problem:
    return Problem(
        Graph.of(machine), start, end, np.array(fixed), parts_of(logits, machine)
    )


def texts(
    machine: Automaton, fixed: list[int], end: np.ndarray, start: int
) -> list[tuple[int, ...]]:
    """All that may stand at the positions."""
    found = []
    for text in itertools.product(range(len(machine.class_of)), repeat=len(fixed)):
        pairs = zip(text, fixed, strict=True)
        if any(k != OPEN and machine.class_of[t] != k for t, k in pairs):
            continue
        state = walk(machine, start, np.array(text))
        if state >= 0 and end[state]:
            found.append(text)
    return found


def expected(
    logits: np.ndarray,
    machine: Automaton,
    fixed: list[int],
    end: np.ndarray,
    start: int = 0,
) -> tuple[list[tuple[int, ...]], np.ndarray, np.ndarray]:
    """The most probable texts, the weight of all, and the posterior of tokens.

    Fixed positions weigh nothing, and have a token of their class.
    """
    free = [i for i, klass in enumerate(fixed) if klass == OPEN]
    unique = {}
    for text in texts(machine, fixed, end, start):
        unique[tuple(text[i] for i in free)] = text
    logs = {
        key: sum(logits[i, t] for i, t in zip(free, key, strict=True)) for key in unique
    }
    logs = {key: log for key, log in logs.items() if log > -np.inf}
    top = max(logs.values(), default=0.0)
    weights = {key: np.exp(log - top) for key, log in logs.items()}
    posterior = np.zeros(logits.shape)
    total = sum(weights.values())
    for key, weight in weights.items():
        for i, token in zip(free, key, strict=True):
            posterior[i, token] += weight / total
    most = max(weights.values(), default=0.0)
    best = [key for key, weight in weights.items() if weight >= most * (1 - 1e-9)]
    return best, np.array(total), posterior


def check(
    solution: Solution, logits: np.ndarray, machine: Automaton, problem: Problem
) -> None:
    fixed = problem.fixed.tolist()
    end = problem.end
    best, total, posterior = expected(logits, machine, fixed, end, problem.start)
    assert solution.found == (total > 0)
    if not solution.found:
        return
    free = [i for i, klass in enumerate(fixed) if klass == OPEN]
    assert tuple(solution.tokens[free]) in best
    for i in free:
        token = solution.tokens[i]
        row = posterior[i]
        assert solution.confidence[i] == pytest.approx(row[token], abs=1e-9)
        assert solution.entropy[i] == pytest.approx(
            -(row[row > 0] * np.log(row[row > 0])).sum(), abs=1e-7
        )
        two = np.sort(row)[::-1]
        assert solution.margin[i] == pytest.approx(two[0] - two[1], abs=1e-9)


@st.composite
def problems(draw) -> tuple[np.ndarray, Automaton, Problem]:
    num_states = draw(st.integers(1, 4))
    vocab, count = draw(st.integers(2, 5)), draw(st.integers(1, 5))
    num_classes = draw(st.integers(1, vocab))
    follows = st.integers(-1, num_states - 1)
    moves = [
        draw(st.lists(follows, min_size=num_classes, max_size=num_classes))
        for _ in range(num_states)
    ]
    accepts = draw(st.lists(st.booleans(), min_size=num_states, max_size=num_states))
    # The end's state and class are the last ones.
    moves = [
        [*row, num_states if accept else -1]
        for row, accept in zip(moves, accepts, strict=True)
    ]
    moves.append([-1] * num_classes + [num_states])
    classes = st.integers(-1, num_classes - 1)
    class_of = draw(st.lists(classes, min_size=vocab - 1, max_size=vocab - 1))
    machine = automaton([*class_of, num_classes], moves, [*accepts, True])
    steps = st.sampled_from([-600.0, -3.0, -1.0, 0.0, 0.0, 0.5, 2.0, -np.inf])
    size = count * vocab
    logits = np.array(draw(st.lists(steps, min_size=size, max_size=size)))
    logits = logits.reshape(count, vocab)
    taken = sorted({*machine.class_of.tolist()} - {-1})
    fixed = [
        draw(st.sampled_from([OPEN, OPEN, *taken])) if taken else OPEN
        for _ in range(count)
    ]
    rest = draw(st.integers(0, 2))
    start = draw(st.integers(0, num_states - 1))
    end = machine.min_length <= rest
    return logits, machine, problem_of(logits, machine, fixed, end, start)
