# SPDX-License-Identifier: Apache-2.0
"""Paths through a token automaton: one consistent choice for all open positions.

A request whose text must match a pattern has its candidates taken together, as one path
that the automaton accepts: the most probable one, or a draw from the product of the
positions' distributions under the condition that the text matches. Whatever part of a
path is written, the rest of the path completes it. How sure a candidate is, is its
probability under the same condition, the **posterior**.

With w_i[k] the weight of class k at position i, and s a state:

    backward   b_i[s] = sum or maximum over k of w_i[k] b_{i+1}[next(s, k)]
    path       from the left: the best score_i[k] + log b_{i+1}[next(s, k)]
    posterior  from the left: w_i[k] b_{i+1}[next(s, k)] / b_i[s] of what s has

Sums are float64 numbers with a binary exponent of their own for each state, so that a
model that is sure of another text than the pattern allows neither overflows them nor
makes them 0. Only states that can be reached are looked at. All is computed in a fixed
order, request by request: nothing depends on the batch. The compiled functions hold no
GIL: many requests share the cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vllm_dlm.constraints import path_loops as loops
from vllm_dlm.constraints.path_loops import NO_CLASS as NO_CLASS
from vllm_dlm.constraints.path_loops import OPEN as OPEN

if TYPE_CHECKING:
    from vllm_dlm.constraints.automaton import Automaton

BEST, TOKEN, TOTAL, SPREAD, SECOND = range(5)
"""Numbers of a row's class, as `kernels/class_stats.py` has them: the largest logit,
its token, sum of exp(d), sum of d exp(d), second-largest logit; d = logit - largest."""


class Graph(NamedTuple):
    """The live pairs of state and class of an automaton, by state; E of them."""

    first: np.ndarray
    """[S + 1] int64: where each state's pairs begin."""
    klass: np.ndarray
    """[E] int32, ascending in each state."""
    target: np.ndarray
    """[E] int32: the state that follows."""
    transitions: np.ndarray
    """[S, K] int32: the same as a table; -1 where nothing follows."""

    @classmethod
    def of(cls, automaton: Automaton) -> Graph:
        """The pairs of an automaton."""
        # Copies: numba compiles anew for arrays that are read-only.
        transitions = np.array(automaton.transitions, dtype=np.int32)
        state, klass = (transitions >= 0).nonzero()
        first = np.searchsorted(state, np.arange(len(transitions) + 1))
        return cls(
            first.astype(np.int64),
            klass.astype(np.int32),
            transitions[state, klass],
            transitions,
        )


class Drawing(NamedTuple):
    """What a path is drawn with, where it is not the most probable one."""

    weights: np.ndarray | None
    """[n, K] float64: log of each class's weight, tempered and truncated; None where
    these are those of `Problem.parts`."""
    scores: np.ndarray
    """[n, K] float64: largest of its tokens' logit / temperature + Gumbel noise."""
    tokens: np.ndarray
    """[n, K] float64: the token of that score."""
    logits: np.ndarray
    """[n, K] float64: that token's logit, as `Problem.parts` measures them."""


@dataclass(frozen=True)
class Problem:
    """The n positions that one request decides in a step, or has written."""

    graph: Graph
    start: int
    """State left of the first position; -1 where no text has it."""
    end: np.ndarray
    """[S] bool: states behind the last position from which a text can be completed."""
    fixed: np.ndarray
    """[n] int64: class of what is written; `OPEN` elsewhere."""
    parts: np.ndarray
    """[n, K, 5] float64: numbers of each class; of no meaning where a class is fixed.
    Classes with a largest logit of -inf are not taken."""
    drawing: Drawing | None = None
    """None for the most probable path."""
    reread: np.ndarray | None = None
    """[n] bool: positions that are written, of which `parts` are measured all the same:
    another token may take the place of what stands there."""
    in_order: bool = False
    """Whether tokens are chosen from the left on, each the best one that leaves a path:
    as an autoregressive model is held to a pattern."""
    also_best: bool = False
    """Whether the most probable path is wanted where another one is drawn, too."""


class Solution(NamedTuple):
    """A path, and how sure its tokens are."""

    found: bool
    """False if no path is left; then the rest is of no meaning."""
    tokens: np.ndarray
    """[n] int64; -1 where a class is fixed. Where it is read again, the best token that
    leaves all states of the path as they are: so whatever part of these is written,
    along with whatever part of the path, what comes out has a path."""
    confidence: np.ndarray
    """[n] float64: posterior of the token."""
    entropy: np.ndarray
    """[n] float64, nats: of the posterior over tokens."""
    margin: np.ndarray
    """[n] float64: best minus second-best posterior of a token."""
    states: np.ndarray
    """[n + 1] int64: states along the path, the first one `start`."""
    classes: np.ndarray
    """[n, K] float64: posterior of each class; given the path's states, where a class
    is fixed and read again."""
    best: np.ndarray
    """[n] int64: tokens of the most probable path; -1 where a class is fixed. Of no
    meaning where one was drawn, and `also_best` does not ask for this one."""


def solve(problem: Problem) -> Solution:
    """The path of one request's positions, and its posterior."""
    count, num_classes = problem.parts.shape[:2]
    graph, start, drawing = problem.graph, problem.start, problem.drawing
    solution = Solution(
        False,
        np.full(count, -1, dtype=np.int64),
        np.zeros(count),
        np.zeros(count),
        np.zeros(count),
        np.zeros(count + 1, dtype=np.int64),
        np.zeros((count, num_classes)),
        np.full(count, -1, dtype=np.int64),
    )
    if start < 0:
        return solution
    end = np.array(problem.end)
    fixed = np.ascontiguousarray(problem.fixed, dtype=np.int64)
    parts = np.ascontiguousarray(problem.parts, dtype=np.float64)
    scores, tokens, weights = np.empty((3, count, num_classes))
    loops.prepare(parts, scores, tokens, weights)
    reached = _reach(graph, start, fixed, weights > -np.inf)
    behind = np.full((count + 1, len(graph.transitions)), -np.inf)
    classes = np.zeros(count, dtype=np.int64)
    if problem.also_best and drawing is not None:
        loops.backward_best(*graph, fixed, scores, end, *reached, behind)
        loops.walk(
            *graph, start, fixed, scores, tokens, behind, solution.best, classes,
            solution.states,
        )  # fmt: skip
        behind[:] = -np.inf
    logits = scores
    if drawing is not None:
        scores, tokens, logits = drawing[1:]
    if problem.in_order:
        # What lies to the right counts as possible or not, and no more.
        possible = np.where(weights > -np.inf, 0.0, -np.inf)
        loops.backward_best(*graph, fixed, possible, end, *reached, behind)
    elif drawing is None:
        loops.backward_best(*graph, fixed, scores, end, *reached, behind)
    else:
        own = weights if drawing.weights is None else drawing.weights
        found = _sums(graph, fixed, own, end, reached)
        loops.logs(*found[1], behind)
    if not loops.walk(
        *graph, start, fixed, scores, tokens, behind, solution.tokens, classes,
        solution.states,
    ):  # fmt: skip
        return solution
    if drawing is None:
        solution.best[:] = solution.tokens
    if problem.in_order or drawing is None or drawing.weights is not None:
        found = _sums(graph, fixed, weights, end, reached)
    split, sums = found
    loops.posterior(*graph, start, fixed, *split, *reached, *sums, solution.classes)
    if problem.reread is not None:
        logits, reread = logits.copy(), np.array(problem.reread)
        loops.exchange(
            graph.transitions, reread, parts, weights, solution.states,
            solution.classes, classes, solution.tokens, logits,
        )  # fmt: skip
        fixed = np.where(reread, OPEN, fixed)
    loops.measure(
        fixed, parts, solution.classes, classes, logits, solution.confidence,
        solution.entropy, solution.margin,
    )  # fmt: skip
    return solution._replace(found=True)


def _reach(
    graph: Graph, start: int, fixed: np.ndarray, usable: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """States that can be reached: their list [n + 1, S], and how many [n + 1]."""
    order = np.empty((len(fixed) + 1, len(graph.transitions)), dtype=np.int32)
    counts = np.zeros(len(fixed) + 1, dtype=np.int64)
    loops.reached(*graph, start, fixed, usable, order, counts)
    return order, counts


def _sums(
    graph: Graph,
    fixed: np.ndarray,
    weights: np.ndarray,
    end: np.ndarray,
    reached: tuple[np.ndarray, np.ndarray],
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Weights [n, K] and their sums [n + 1, S], as mantissas and exponents."""

    def numbers(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        return np.empty(shape), np.empty(shape, dtype=np.int64)

    split = numbers(weights.shape)
    sums = numbers((len(fixed) + 1, len(graph.transitions)))
    loops.split(np.ascontiguousarray(weights), *split)
    loops.backward_sum(*graph, fixed, *split, end, *reached, *sums)
    return split, sums


def unread(num_positions: int, num_classes: int) -> np.ndarray:
    """[n, K, 5]: `parts` of positions of which nothing is known: all classes alike."""
    parts = np.zeros((num_positions, num_classes, 5))
    parts[..., TOTAL], parts[..., SECOND] = 1.0, -np.inf
    return parts


def classes_of(automaton: Automaton, tokens: np.ndarray) -> np.ndarray:
    """[n] int64: classes of tokens [n]; `NO_CLASS` where no state takes one."""
    known = (tokens >= 0) & (tokens < len(automaton.class_of))
    classes = automaton.class_of[np.where(known, tokens, 0)].astype(np.int64)
    return np.where(known & (classes >= 0), classes, NO_CLASS)


def walk(automaton: Automaton, state: int, tokens: np.ndarray) -> int:
    """The state behind tokens [n]; -1 where they leave the automaton."""
    for token in tokens.tolist():
        known = 0 <= token < len(automaton.class_of)
        klass = int(automaton.class_of[token]) if known else -1
        if state < 0 or klass < 0:
            return -1
        state = int(automaton.transitions[state, klass])
    return state


def feasible(
    graph: Graph, start: int, end: np.ndarray, fixed: np.ndarray, usable: np.ndarray
) -> np.ndarray:
    """[n, K] bool: classes that some path takes, whatever their weights.

    Args:
        start, end, fixed: as in `Problem`.
        usable: [n, K] bool: classes that may be taken.
    """
    found = np.zeros(usable.shape, dtype=np.bool_)
    if start >= 0:
        end, usable = np.array(end), np.ascontiguousarray(usable)
        fixed = np.ascontiguousarray(fixed, dtype=np.int64)
        reached = _reach(graph, start, fixed, usable)
        loops.feasible(*graph, end, fixed, usable, *reached, found)
    return found


def possible(
    automaton: Automaton,
    graph: Graph,
    fixed: np.ndarray,
    shortest: int,
    end: np.ndarray,
) -> np.ndarray:
    """[S] bool: states left of n positions from which these can be gone through.

    Args:
        fixed: [n] int64: classes of what is written; `OPEN` elsewhere.
        shortest: positions that no end token may stand at, from the first on.
        end: [S] bool: states behind the last one that are wanted.
    """
    rows = np.empty((len(fixed) + 1, len(end)), dtype=np.bool_)
    rows[-1] = end
    fixed = np.ascontiguousarray(fixed, dtype=np.int64)
    loops.complete(*graph, fixed, shortest, automaton.end_class, rows)
    first: np.ndarray = rows[0]
    return first


def rehearse() -> None:
    """Call all that is compiled, once: the first request is not to wait for that."""
    one = np.zeros(1, dtype=np.int32)
    graph = Graph(np.arange(2), one, one, one[:, None])
    end, fixed, parts = np.ones(1, dtype=np.bool_), np.full(1, OPEN), unread(1, 1)
    drawing = Drawing(*np.zeros((4, 1, 1)))
    for how in (None, drawing):
        solve(Problem(graph, 0, end, fixed, parts, how))
        is_read = np.ones(1, dtype=np.bool_)
        solve(Problem(graph, 0, end, np.zeros(1, np.int64), parts, how, is_read))
    feasible(graph, 0, end, fixed, np.ones((1, 1), dtype=np.bool_))
    rows = np.ones((2, 1), dtype=np.bool_)
    loops.complete(*graph, fixed, 0, 0, rows)


class Completions:
    """From which states a text can be completed, at each of its positions.

    A text has exactly `length` positions: those behind its end hold end tokens.

    Args:
        automaton: of the pattern.
        graph: its pairs.
        length: most tokens of the text.
        shortest: positions that no end token may stand at, from the first on.
        pins: [length] int64: classes of tokens that stand in the text from the start
            (`classes_of`), `OPEN` elsewhere; None for none.
    """

    def __init__(
        self,
        automaton: Automaton,
        graph: Graph,
        length: int,
        shortest: int = 0,
        pins: np.ndarray | None = None,
    ) -> None:
        self._min_length = automaton.min_length
        self._length = length
        pinned = np.full(length, OPEN, dtype=np.int64) if pins is None else pins
        (places,) = (pinned != OPEN).nonzero()
        self._plain_from = max(
            min(shortest, length), int(places[-1]) + 1 if len(places) else 0
        )
        """From here on nothing but the length counts."""
        self._rows = np.empty((self._plain_from + 1, len(graph.transitions)), np.bool_)
        self._rows[-1] = self._plain(self._plain_from)
        loops.complete(
            *graph,
            pinned[: self._plain_from].astype(np.int64),
            shortest,
            automaton.end_class,
            self._rows,
        )

    def at(self, position: int) -> np.ndarray:
        """[S] bool: states left of a position from which the text can be completed."""
        if position < self._plain_from:
            row: np.ndarray = self._rows[position]
            return row
        return self._plain(position)

    def _plain(self, position: int) -> np.ndarray:
        rows: np.ndarray = self._min_length <= max(self._length - position, 0)
        return rows
