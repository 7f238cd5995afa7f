# SPDX-License-Identifier: Apache-2.0
"""From the tree of a regular expression to the smallest machine over bytes of UTF-8.

Tokens are bytes, and a character may be split over several of them, so the machine has
states inside characters too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_dlm.constraints.limits import Clock, ConstraintError, Limits
from vllm_dlm.constraints.syntax import Characters, Choice, Concat, Node, Repeat

_SURROGATES = (0xD800, 0xDFFF)
_LAST_OF_LENGTH = (0x7F, 0x7FF, 0xFFFF)
_CHECK_EACH = 256


@dataclass(frozen=True)
class ByteMachine:
    """A deterministic machine over bytes; it starts in state 0.

    From each state a match can be reached, and no two states do the same.
    """

    moves: NDArray[np.int32]
    """[states, 256]: the next state, or -1."""
    accepting: NDArray[np.bool_]
    """[states]"""


def byte_machine(tree: Node, limits: Limits, clock: Clock) -> ByteMachine:
    """The smallest deterministic machine that accepts what a tree matches.

    Raises:
        ConstraintError: it is too large, or nothing matches.
    """
    builder = _Builder(limits, clock)
    end = builder.add(tree, builder.new())
    return _smallest(*_determine(builder, end, limits, clock), clock)


def utf8_ranges(first: int, last: int) -> Iterator[list[tuple[int, int]]]:
    """Code points as sequences of byte intervals: each combination is a character.

    Args:
        first, last: an interval of code points; surrogates in it are left out.
    """
    if first > last:
        return
    if first <= _SURROGATES[1] and last >= _SURROGATES[0]:
        yield from utf8_ranges(first, _SURROGATES[0] - 1)
        yield from utf8_ranges(_SURROGATES[1] + 1, last)
        return
    for bound in _LAST_OF_LENGTH:
        if first <= bound < last:
            yield from utf8_ranges(first, bound)
            yield from utf8_ranges(bound + 1, last)
            return
    if last > 0x7F:
        # Where the leading bytes differ, those behind must be free.
        for tail in (0x3F, 0xFFF, 0x3FFFF):
            if first | tail == last | tail:
                continue
            if first & tail:
                yield from utf8_ranges(first, first | tail)
                yield from utf8_ranges((first | tail) + 1, last)
                return
            if last & tail != tail:
                yield from utf8_ranges(first, (last & ~tail) - 1)
                yield from utf8_ranges(last & ~tail, last)
                return
    yield list(zip(chr(first).encode(), chr(last).encode(), strict=True))


class _Builder:
    """A machine that may be in several states at once, while it is built.

    Attributes:
        free: state -> states that are reached without a byte.
        moves: state -> (first byte, last byte, next state).
    """

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self.free: list[list[int]] = []
        self.moves: list[list[tuple[int, int, int]]] = []
        self._limits, self._clock = limits, clock
        self._spelled: dict[Characters, list[list[tuple[int, int]]]] = {}

    def new(self) -> int:
        count = len(self.free)
        if count % _CHECK_EACH == 0:
            self._limits.check("parts", count, self._limits.parts)
            self._clock.check()
        self.free.append([])
        self.moves.append([])
        return count

    def add(self, node: Node, start: int) -> int:
        """Add what a tree matches behind `start`; returns the state behind it."""
        if isinstance(node, Characters):
            return self._add_characters(node, start)
        if isinstance(node, Concat):
            return self._add_parts(node.parts, start)
        if isinstance(node, Choice):
            end = self.new()
            for branch in node.branches:
                own = self.new()
                self.free[start].append(own)
                self.free[self.add(branch, own)].append(end)
            return end
        for _ in range(node.least):
            start = self.add(node.part, start)
        if node.most is None:
            loop = self.new()
            self.free[start].append(loop)
            self.free[self.add(node.part, loop)].append(loop)
            # A state of its own: what is added behind must not lead into the loop.
            end = self.new()
            self.free[loop].append(end)
            return end
        end = self.new()
        self.free[start].append(end)
        for _ in range(node.most - node.least):
            start = self.add(node.part, start)
            self.free[start].append(end)
        return end

    def _add_parts(self, parts: tuple[Node, ...], start: int) -> int:
        """Add parts one behind another.

        Entries with something between them, `x(, x)*`, are one loop, with the entry
        once: nested lists would grow by a factor of two with every level otherwise.
        """
        i = 0
        while i < len(parts):
            length = _entry_length(parts, i)
            if not length:
                start = self.add(parts[i], start)
                i += 1
                continue
            repeated = parts[i + length]
            assert isinstance(repeated, Repeat) and isinstance(repeated.part, Concat)
            between = repeated.part.parts[:-length]
            loop = self.new()
            self.free[start].append(loop)
            behind = self._add_parts(parts[i : i + length], loop)
            self.free[self._add_parts(between, behind)].append(loop)
            start = self.new()
            self.free[behind].append(start)
            i += length + 1
        return start

    def _add_characters(self, node: Characters, start: int) -> int:
        end = self.new()
        spelled = self._spelled.get(node)
        if spelled is None:
            spelled = [way for each in node.ranges for way in utf8_ranges(*each)]
            self._spelled[node] = spelled
        for intervals in spelled:
            at = start
            for low, high in intervals[:-1]:
                self.moves[at].append((low, high, self.new()))
                at = self.moves[at][-1][2]
            self.moves[at].append((*intervals[-1], end))
        return end


def _entry_length(parts: tuple[Node, ...], i: int) -> int:
    """How many parts from `i` on are the entry of a list; 0 if none is."""
    for j in range(i + 1, len(parts)):
        part = parts[j]
        if not isinstance(part, Repeat) or (part.least, part.most) != (0, None):
            continue
        length = j - i
        inside = part.part
        if (
            isinstance(inside, Concat)
            and len(inside.parts) > length
            and inside.parts[-length:] == parts[i:j]
        ):
            return length
        return 0
    return 0


def _determine(
    builder: _Builder, end: int, limits: Limits, clock: Clock
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """The machine whose states are sets of the builder's.

    Returns:
        moves: [states, byte kinds], the next state or -1.
        accepting: [states].
        kind_of: [256], which bytes no move tells apart.
    """
    edges = {0, 256}
    for leaving in builder.moves:
        for low, high, _ in leaving:
            edges |= {low, high + 1}
    cuts = np.array(sorted(edges))
    kind_of = np.searchsorted(cuts, np.arange(256), side="right") - 1
    first_kind = {int(cut): kind for kind, cut in enumerate(cuts)}
    kinds = len(cuts) - 1

    def closed(states: frozenset[int]) -> frozenset[int]:
        """With what is reached without a byte; only states that matter are kept."""
        waiting, seen = list(states), set(states)
        while waiting:
            for state in builder.free[waiting.pop()]:
                if state not in seen:
                    seen.add(state)
                    waiting.append(state)
        return frozenset(s for s in seen if builder.moves[s] or s == end)

    start = closed(frozenset({0}))
    number = {start: 0}
    order, rows = [start], list[list[int]]()
    known: dict[frozenset[int], frozenset[int]] = {}
    for subset in order:
        if len(rows) % _CHECK_EACH == 0:
            clock.check()
        targets: dict[int, set[int]] = {}
        for state in subset:
            for low, high, following in builder.moves[state]:
                for kind in range(first_kind[low], first_kind[high + 1]):
                    targets.setdefault(kind, set()).add(following)
        row = [-1] * kinds
        for kind, states in targets.items():
            key = frozenset(states)
            reached = known.get(key)
            if reached is None:
                reached = known[key] = closed(key)
            if reached not in number:
                limits.check("states over bytes", len(order) + 1, limits.subsets)
                number[reached] = len(order)
                order.append(reached)
            row[kind] = number[reached]
        rows.append(row)
    accepting = np.array([end in subset for subset in order])
    return np.array(rows, np.int64).reshape(len(rows), kinds), accepting, kind_of


def _smallest(
    moves: NDArray[np.int64],
    accepting: NDArray[np.bool_],
    kind_of: NDArray[np.int64],
    clock: Clock,
) -> ByteMachine:
    """Without states that reach no match, and with those merged that do the same."""
    count, kinds = moves.shape
    table = np.vstack([moves, np.full((1, kinds), -1)])
    table[table < 0] = count
    live = np.append(accepting, False)
    while True:
        wider = live | live[table].any(axis=1)
        if (wider == live).all():
            break
        live = wider
        clock.check()
    if not live[0]:
        raise ConstraintError("the pattern matches no text at all")
    table[~live[table]] = count
    # Two states are told apart by a hash of what their moves lead to; each round looks
    # a byte further. 64 bits: no two of 20,000 states meet by chance.
    random = np.random.default_rng(5)
    factors = random.integers(0, 1 << 63, kinds, dtype=np.uint64) * 2 + 1
    group = np.append(accepting, False) + 2 * live
    before, found = 0, len(np.unique(group))
    while found > before:
        clock.check()
        names = random.integers(0, 1 << 63, max(found, 4), dtype=np.uint64)
        hashed = (names[group[table]] * factors).sum(axis=1, dtype=np.uint64)
        hashed = (hashed ^ (hashed >> np.uint64(29))) + names[group] * np.uint64(3)
        distinct, group = np.unique(hashed, return_inverse=True)
        before, found = found, len(distinct)
    return _numbered(table, np.append(accepting, False), group, kind_of)


def _numbered(
    table: NDArray[np.int64],
    accepting: NDArray[np.bool_],
    group: NDArray[np.int64],
    kind_of: NDArray[np.int64],
) -> ByteMachine:
    """One state for each group that the start reaches, in order of their distance.

    Args:
        table: [states + 1, byte kinds]; the last state is dead.
        accepting: [states + 1].
        group: [states + 1].
        kind_of: [256].
    """
    dead = group[-1]
    member = np.zeros(int(group.max()) + 1, np.int64)
    member[group] = np.arange(len(group))
    between = group[table[member]]
    number = {int(group[0]): 0}
    order = [int(group[0])]
    for each in order:
        for target in dict.fromkeys(between[each].tolist()):
            if target != dead and target not in number:
                number[target] = len(order)
                order.append(target)
    new = np.full(len(member), -1, np.int32)
    new[order] = np.arange(len(order), dtype=np.int32)
    kept = np.array(order)
    return ByteMachine(new[between[kept]][:, kind_of], accepting[member[kept]])
