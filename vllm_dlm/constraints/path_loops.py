# SPDX-License-Identifier: Apache-2.0
"""The loops behind `paths.py`, in numba. They hold no GIL.

Arguments that many of them have: `first`, `klass`, `target` and `transitions` are a
`Graph`; `fixed` [n] holds the class of what is written, negative for open positions;
`order` [n + 1, S] and `counts` [n + 1] hold the states that can be reached at each
position, so that no others are looked at. Last come the arrays that are filled.
"""

from __future__ import annotations

import math

import numpy as np

from vllm_dlm.kernels.numba_jit import jit

OPEN, NO_CLASS = -1, -2
"""In place of a position's class: any class, by its weight; none, so that no text has
what is written there."""

_EXACT = jit(error_model="numpy")

_NOTHING = -(1 << 60)
"""Exponent of 0."""
_POWERS = 2.0 ** -np.arange(128.0)
_LOG_2 = math.log(2.0)
_NEGLIGIBLE = 1e-40
"""Posterior of a state below which what follows from it is left out."""


@_EXACT
def reached(first, klass, target, transitions, start, fixed, usable, order, counts):
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
def backward_best(
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
def split(weights, mantissas, exponents):
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
def backward_sum(
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
def walk(
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
def posterior(
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
def measure(fixed, parts, posterior, classes, logits, confidence, entropy, margin):
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
def exchange(
    transitions, reread, parts, weights, states, posterior, classes, tokens, logits
):  # fmt: skip
    """What may stand in place of written tokens, if a path's states stay as they are.

    `reread` is set to False where no token has a weight.
    """
    for i in range(len(reread)):
        if not reread[i]:
            continue
        best, total = -1, 0.0
        top = -np.inf
        for k in range(weights.shape[1]):
            if transitions[states[i], k] == states[i + 1]:
                top = max(top, weights[i, k])
        if top == -np.inf:
            reread[i] = False
            continue
        posterior[i, :] = 0.0
        for k in range(weights.shape[1]):
            if transitions[states[i], k] == states[i + 1] and weights[i, k] > -np.inf:
                posterior[i, k] = math.exp(weights[i, k] - top)
                total += posterior[i, k]
                if (
                    best < 0
                    or parts[i, k, 0] > parts[i, best, 0]
                    or (
                        parts[i, k, 0] == parts[i, best, 0]
                        and parts[i, k, 1] < parts[i, best, 1]
                    )
                ):
                    best = k
        posterior[i, :] /= total
        classes[i], tokens[i] = best, np.int64(parts[i, best, 1])
        logits[i, best] = parts[i, best, 0]


@_EXACT
def prepare(parts, scores, tokens, weights):
    """The largest logit of each class, its token, and the log of the class's weight."""
    for i in range(parts.shape[0]):
        for k in range(parts.shape[1]):
            scores[i, k] = weights[i, k] = -np.inf
            tokens[i, k] = parts[i, k, 1]
            if -np.inf < parts[i, k, 0] < np.inf:
                scores[i, k] = parts[i, k, 0]
                weights[i, k] = parts[i, k, 0] + math.log(parts[i, k, 2])


@_EXACT
def logs(mantissas, exponents, logs):
    for i in range(logs.shape[0]):
        for state in range(logs.shape[1]):
            if mantissas[i, state] > 0.0:
                logs[i, state] = math.log(mantissas[i, state])
                logs[i, state] += exponents[i, state] * _LOG_2


@_EXACT
def feasible(
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
def complete(first, klass, target, transitions, pins, shortest, end_class, rows):
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
