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

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vllm_dlm.kernels.numba_jit import jit

if TYPE_CHECKING:
    from vllm_dlm.constraints.automaton import Automaton

OPEN, NO_CLASS = -1, -2
"""In place of a position's class: any class, by its weight; none, so that no text has
what is written there."""

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

    weights: np.ndarray
    """[n, K] float64: log of each class's weight, tempered and truncated."""
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


class Solution(NamedTuple):
    """A path, and how sure its tokens are."""

    found: bool
    """False if no path is left; then the rest is of no meaning."""
    tokens: np.ndarray
    """[n] int64; -1 where a class is fixed."""
    confidence: np.ndarray
    """[n] float64: posterior of the token."""
    entropy: np.ndarray
    """[n] float64, nats: of the posterior over tokens."""
    margin: np.ndarray
    """[n] float64: best minus second-best posterior of a token."""
    states: np.ndarray
    """[n + 1] int64: states along the path, the first one `start`."""
    classes: np.ndarray
    """[n, K] float64: posterior of each class."""


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
    )
    if start < 0:
        return solution
    end = np.array(problem.end)
    fixed = np.ascontiguousarray(problem.fixed, dtype=np.int64)
    parts = np.ascontiguousarray(problem.parts, dtype=np.float64)
    scores, tokens, weights = np.empty((3, count, num_classes))
    _prepare(parts, scores, tokens, weights)
    reached = _reach(graph, start, fixed, weights > -np.inf)
    behind = np.full((count + 1, len(graph.transitions)), -np.inf)
    if drawing is None:
        logits = scores
        _backward_best(*graph, fixed, scores, end, *reached, behind)
    else:
        scores, tokens, logits = drawing[1:]
        _, sums = _sums(graph, fixed, drawing.weights, end, reached)
        _logs(*sums, behind)
    classes = np.zeros(count, dtype=np.int64)
    if not _walk(
        *graph, start, fixed, scores, tokens, behind, solution.tokens, classes,
        solution.states,
    ):  # fmt: skip
        return solution
    split, sums = _sums(graph, fixed, weights, end, reached)
    _posterior(*graph, start, fixed, *split, *reached, *sums, solution.classes)
    _measure(
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
    _reached(*graph, start, fixed, usable, order, counts)
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
    _split(np.ascontiguousarray(weights), *split)
    _backward_sum(*graph, fixed, *split, end, *reached, *sums)
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
        _feasible(*graph, end, fixed, usable, *reached, found)
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
    _complete(*graph, fixed, shortest, automaton.end_class, rows)
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
    feasible(graph, 0, end, fixed, np.ones((1, 1), dtype=np.bool_))
    rows = np.ones((2, 1), dtype=np.bool_)
    _complete(*graph, fixed, 0, 0, rows)


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
        _complete(
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


# --- Compiled ----------------------------------------------------------------------

_EXACT = jit(error_model="numpy")

_NOTHING = -(1 << 60)
"""Exponent of 0."""
_POWERS = 2.0 ** -np.arange(128.0)
_LOG_2 = math.log(2.0)
_NEGLIGIBLE = 1e-40
"""Posterior of a state below which what follows from it is left out."""


@_EXACT
def _reached(first, klass, target, transitions, start, fixed, usable, order, counts):  # type: ignore[no-untyped-def]
    """States that can be reached at each position, in `order` [n + 1, S]."""
    num_states = len(transitions)
    seen = np.full(num_states, -1, np.int64)
    order[0, 0], counts[0] = start, 1
    for i in range(len(fixed)):
        count = 0
        for place in range(counts[i]):
            state = order[i, place]
            if fixed[i] >= 0:
                follows = transitions[state, fixed[i]]
                if follows >= 0 and seen[follows] != i:
                    seen[follows] = i
                    order[i + 1, count] = follows
                    count += 1
                continue
            for pair in range(first[state], first[state + 1]):
                follows = target[pair]
                if seen[follows] != i and usable[i, klass[pair]]:
                    seen[follows] = i
                    order[i + 1, count] = follows
                    count += 1
        counts[i + 1] = count


@_EXACT
def _backward_best(  # type: ignore[no-untyped-def]
    first, klass, target, transitions, fixed, weights, end, order, counts, behind
):
    """Logs of the largest weights: `behind` [n + 1, S], -inf for nothing."""
    count = len(fixed)
    behind[:] = -np.inf
    for place in range(counts[count]):
        state = order[count, place]
        if end[state]:
            behind[count, state] = 0.0
    for i in range(count - 1, -1, -1):
        for place in range(counts[i]):
            state = order[i, place]
            best = -np.inf
            if fixed[i] >= 0:
                follows = transitions[state, fixed[i]]
                if follows >= 0:
                    best = behind[i + 1, follows]
            else:
                for pair in range(first[state], first[state + 1]):
                    value = weights[i, klass[pair]] + behind[i + 1, target[pair]]
                    best = max(best, value)
            behind[i, state] = best


@_EXACT
def _split(weights, mantissas, exponents):  # type: ignore[no-untyped-def]
    """Logs of weights as numbers in [1, 2) and their exponents, 0 for a row's best.

    A row's weights may have any common factor: each path goes through each row once.
    """
    for i in range(weights.shape[0]):
        top = -np.inf
        for k in range(weights.shape[1]):
            if weights[i, k] > top:
                top = weights[i, k]
        for k in range(weights.shape[1]):
            if weights[i, k] > -np.inf:
                power = (weights[i, k] - top) / _LOG_2
                whole = math.floor(power)
                mantissas[i, k] = 2.0 ** (power - whole)
                exponents[i, k] = np.int64(whole)
            else:
                mantissas[i, k], exponents[i, k] = 0.0, _NOTHING


@_EXACT
def _backward_sum(  # type: ignore[no-untyped-def]
    first, klass, target, transitions, fixed, w_mantissas, w_exponents, end,
    order, counts, mantissas, exponents,
):  # fmt: skip
    """Sums of weights: `mantissas` [n + 1, S] in [0.5, 1), or 0, and `exponents`."""
    count = len(fixed)
    mantissas[:] = 0.0
    exponents[:] = _NOTHING
    for place in range(counts[count]):
        state = order[count, place]
        if end[state]:
            mantissas[count, state], exponents[count, state] = 0.5, 1
    for i in range(count - 1, -1, -1):
        for place in range(counts[i]):
            state = order[i, place]
            if fixed[i] >= 0:
                follows = transitions[state, fixed[i]]
                if follows >= 0:
                    mantissas[i, state] = mantissas[i + 1, follows]
                    exponents[i, state] = exponents[i + 1, follows]
                continue
            total, top = 0.0, _NOTHING
            for pair in range(first[state], first[state + 1]):
                k, follows = klass[pair], target[pair]
                value = w_mantissas[i, k] * mantissas[i + 1, follows]
                if value > 0.0:
                    power = w_exponents[i, k] + exponents[i + 1, follows]
                    if power <= top:
                        if top - power < 128:
                            total += value * _POWERS[top - power]
                    else:
                        total = (
                            total * _POWERS[power - top] if (power - top < 128) else 0.0
                        )
                        total += value
                        top = power
            if total > 0.0:
                mantissa, power = math.frexp(total)
                mantissas[i, state], exponents[i, state] = mantissa, top + power


@_EXACT
def _walk(  # type: ignore[no-untyped-def]
    first, klass, target, transitions, start, fixed, scores, tokens, behind,
    out_tokens, out_classes, out_states,
):  # fmt: skip
    """The path of the best scores; False where none is left.

    Of equal scores, the lowest token's.
    """
    state = start
    out_states[0] = state
    if behind[0, state] == -np.inf:
        return False
    for i in range(len(fixed)):
        if fixed[i] >= 0:
            state = transitions[state, fixed[i]]
            out_classes[i] = fixed[i]
        else:
            best, chosen = -np.inf, -1
            for pair in range(first[state], first[state + 1]):
                k = klass[pair]
                value = scores[i, k] + behind[i + 1, target[pair]]
                if value > best or (
                    value == best
                    and chosen >= 0
                    and tokens[i, k] < tokens[i, klass[chosen]]
                ):
                    best, chosen = value, pair
            if chosen < 0:
                return False
            out_classes[i] = klass[chosen]
            out_tokens[i] = np.int64(tokens[i, klass[chosen]])
            state = target[chosen]
        out_states[i + 1] = state
    return True


@_EXACT
def _posterior(  # type: ignore[no-untyped-def]
    first, klass, target, transitions, start, fixed, w_mantissas, w_exponents,
    order, counts, mantissas, exponents, posterior,
):  # fmt: skip
    """Probability of each class at each position, given that the text matches."""
    num_states = len(transitions)
    here, ahead = np.zeros(num_states), np.zeros(num_states)
    here[start] = 1.0
    for i in range(len(fixed)):
        ahead[:] = 0.0
        for place in range(counts[i]):
            state = order[i, place]
            share = here[state]
            if share < _NEGLIGIBLE:
                continue
            if fixed[i] >= 0:
                posterior[i, fixed[i]] += share
                ahead[transitions[state, fixed[i]]] += share
                continue
            share /= mantissas[i, state]
            power = exponents[i, state]
            for pair in range(first[state], first[state + 1]):
                k, follows = klass[pair], target[pair]
                less = power - w_exponents[i, k] - exponents[i + 1, follows]
                if less < 128:
                    value = w_mantissas[i, k] * mantissas[i + 1, follows]
                    value *= share * _POWERS[less]
                    posterior[i, k] += value
                    ahead[follows] += value
        here, ahead = ahead, here


@_EXACT
def _measure(  # type: ignore[no-untyped-def]
    fixed, parts, posterior, classes, logits, confidence, entropy, margin
):
    """Statistics of the posterior over tokens, from that over classes.

    In class k, a token has its share exp(logit - best) / total of the class.
    """
    for i in range(len(fixed)):
        if fixed[i] >= 0:
            continue
        chosen = classes[i]
        share = math.exp(logits[i, chosen] - parts[i, chosen, 0])
        share /= parts[i, chosen, 2]
        confidence[i] = min(posterior[i, chosen] * share, 1.0)
        spread, most, second = 0.0, 0.0, 0.0
        for k in range(posterior.shape[1]):
            q = posterior[i, k]
            if q <= 0.0:
                continue
            total = parts[i, k, 2]
            spread += q * (math.log(total) - parts[i, k, 3] / total - math.log(q))
            one = q / total
            two = one * math.exp(parts[i, k, 4] - parts[i, k, 0])
            if one > most:
                second = max(most, two)
                most = one
            elif one > second:
                second = one
        entropy[i] = max(spread, 0.0)
        margin[i] = min(most - second, 1.0)


@_EXACT
def _prepare(parts, scores, tokens, weights):  # type: ignore[no-untyped-def]
    """The largest logit of each class, its token, and the log of the class's weight."""
    for i in range(parts.shape[0]):
        for k in range(parts.shape[1]):
            scores[i, k] = weights[i, k] = -np.inf
            tokens[i, k] = parts[i, k, 1]
            if -np.inf < parts[i, k, 0] < np.inf:
                scores[i, k] = parts[i, k, 0]
                weights[i, k] = parts[i, k, 0] + math.log(parts[i, k, 2])


@_EXACT
def _logs(mantissas, exponents, logs):  # type: ignore[no-untyped-def]
    for i in range(logs.shape[0]):
        for state in range(logs.shape[1]):
            if mantissas[i, state] > 0.0:
                logs[i, state] = math.log(mantissas[i, state])
                logs[i, state] += exponents[i, state] * _LOG_2


@_EXACT
def _feasible(  # type: ignore[no-untyped-def]
    first, klass, target, transitions, end, fixed, usable, order, counts, found
):
    """Mark the classes that some path takes."""
    count, num_states = len(fixed), len(transitions)
    alive, before = end.copy(), np.empty(num_states, np.bool_)
    for i in range(count - 1, -1, -1):
        before[:] = False
        for place in range(counts[i]):
            state = order[i, place]
            if fixed[i] >= 0:
                follows = transitions[state, fixed[i]]
                if follows >= 0 and alive[follows]:
                    before[state] = found[i, fixed[i]] = True
                continue
            for pair in range(first[state], first[state + 1]):
                if usable[i, klass[pair]] and alive[target[pair]]:
                    before[state] = found[i, klass[pair]] = True
        alive, before = before, alive


@_EXACT
def _complete(first, klass, target, transitions, pins, shortest, end_class, rows):  # type: ignore[no-untyped-def]
    """Fill `rows` [n + 1, S] from its last one: states that can go on to that one."""
    for i in range(len(pins) - 1, -1, -1):
        pin, early = pins[i], i < shortest
        if i + 1 < len(pins) and pin == pins[i + 1] == OPEN:
            same = early == (i + 1 < shortest)
            if same and np.array_equal(rows[i + 1], rows[i + 2]):
                # So it goes on, as long as nothing else is asked for.
                rows[i] = rows[i + 1]
                continue
        for state in range(rows.shape[1]):
            alive = False
            if pin >= 0:
                follows = transitions[state, pin]
                alive = follows >= 0 and rows[i + 1, follows]
                alive = alive and not (early and pin == end_class)
            else:
                for pair in range(first[state], first[state + 1]):
                    if (
                        pin != NO_CLASS
                        and rows[i + 1, target[pair]]
                        and not (early and klass[pair] == end_class)
                    ):
                        alive = True
                        break
            rows[i, state] = alive
