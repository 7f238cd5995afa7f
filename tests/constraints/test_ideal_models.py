# SPDX-License-Identifier: Apache-2.0
"""What texts of an ideal model, one token a step, are distributed like under a pattern.

The model knows the exact conditional distribution of each position, given what is
written. Its texts are compared with its joint distribution under the condition that the
text matches, by total variation distance; beside them those of masks for each position,
right by themselves.
"""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np
import pytest
from constraints.path_cases import automaton, parts_of

from vllm_dlm.constraints.automaton import Automaton
from vllm_dlm.constraints.paths import OPEN, Graph, Problem, feasible, solve, walk

VOCAB, LENGTH, DRAWS = 3, 4, 6
TEXTS = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)))


def truth(kind: str, generator: np.random.Generator) -> np.ndarray:
    """[texts]: a random joint distribution."""
    if kind == "arbitrary":
        weights = generator.exponential(size=len(TEXTS)) ** 2
    else:
        rows = generator.exponential(size=(LENGTH, VOCAB, VOCAB))
        if kind == "independent":
            rows[:] = rows[:, :1]
        weights = np.ones(len(TEXTS))
        for i in range(LENGTH):
            before = TEXTS[:, i - 1] if i else np.zeros(len(TEXTS), dtype=np.int64)
            row = rows[i] / rows[i].sum(axis=1, keepdims=True)
            weights = weights * row[before, TEXTS[:, i]]
    return weights / weights.sum()


def machine(generator: np.random.Generator) -> Automaton:
    """A random automaton of three states, each token a class of its own."""
    while True:
        moves = generator.integers(-1, 3, (3, VOCAB))
        accepts = generator.random(3) < 0.5
        rows = [[*row, 3 if a else -1] for row, a in zip(moves, accepts, strict=True)]
        made = automaton(
            [*range(VOCAB), VOCAB], [*rows, [-1] * VOCAB + [3]], [*accepts, True]
        )
        matching = [matches_text(made, text) for text in TEXTS]
        if 2 <= sum(matching) < len(TEXTS):
            return made


def matches_text(made: Automaton, text: np.ndarray) -> bool:
    state = walk(made, 0, text)
    return state >= 0 and bool(made.accepting[state])


def step(
    joint: np.ndarray, made: Automaton, written: tuple[int, ...], by_paths: bool
) -> np.ndarray:
    """[n, V]: what each open position's token is drawn from."""
    partial = np.array(written)
    fits = ((partial < 0) | (partial == TEXTS)).all(axis=1)
    shares = joint * fits
    rows = np.zeros((LENGTH, VOCAB + 1))
    for i, token in itertools.product(range(LENGTH), range(VOCAB)):
        rows[i, token] = shares[TEXTS[:, i] == token].sum()
    rows /= rows.sum(axis=1, keepdims=True)
    fixed = np.where(partial < 0, OPEN, partial)
    # Texts have this length: an end token may follow them only.
    end = made.accepting.copy()
    end[made.end_state] = False
    with np.errstate(divide="ignore"):
        parts = parts_of(np.log(rows), made)
    graph = Graph.of(made)
    if by_paths:
        return solve(Problem(graph, 0, end, fixed, parts)).classes[:, :VOCAB]
    allowed = feasible(graph, 0, end, fixed, parts[..., 0] > -np.inf)
    masked = np.where(allowed, rows, 0.0)[:, :VOCAB]
    return masked / np.maximum(masked.sum(axis=1, keepdims=True), 1e-300)


def distance(joint: np.ndarray, made: Automaton, by_paths: bool) -> float:
    """Total variation between texts written in random order and the joint one."""
    reached = {(-1,) * LENGTH: 1.0}
    for _ in range(LENGTH):
        further: dict[tuple[int, ...], float] = defaultdict(float)
        for written, chance in reached.items():
            rows = step(joint, made, written, by_paths)
            places = [i for i, token in enumerate(written) if token < 0]
            for i, token in itertools.product(places, range(VOCAB)):
                if rows[i, token] > 0:
                    text = (*written[:i], token, *written[i + 1 :])
                    further[text] += chance * rows[i, token] / len(places)
        reached = further
    matches = np.array([matches_text(made, text) for text in TEXTS])
    wanted = joint * matches / (joint * matches).sum()
    found = np.array([reached.get(tuple(text.tolist()), 0.0) for text in TEXTS])
    assert not found[~matches].any()
    return float(np.abs(found - wanted).sum() / 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["independent", "markov", "arbitrary"])
def test_paths_are_nearer_to_the_joint_distribution_than_masks(kind: str):
    generator = np.random.default_rng(7)
    by_paths, by_masks = [], []
    for _ in range(DRAWS):
        joint, made = truth(kind, generator), machine(generator)
        by_paths.append(distance(joint, made, True))
        by_masks.append(distance(joint, made, False))
    if kind == "independent":
        assert max(by_paths) < 1e-9
    assert np.mean(by_paths) < np.mean(by_masks)
