# SPDX-License-Identifier: Apache-2.0
"""Decimal numbers between two bounds, as trees of regular expressions.

Numbers are written without an exponent, without superfluous zeros in front, and zero
without a sign, with at most `MOST_DIGITS` digits on each side of the point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from vllm_dlm.constraints.syntax import (
    EMPTY,
    Characters,
    Choice,
    Node,
    Repeat,
    choice,
    concat,
    literal,
)

MOST_DIGITS = 18
"""Digits in front of the point, and behind it: all of these fit into 64 bits."""

NOTHING: Node = Choice(())
"""The tree of no text."""


@dataclass(frozen=True)
class Bound:
    """A bound of numbers that are not negative."""

    value: Decimal
    strict: bool = False
    """Whether the bound itself is outside."""

    @property
    def whole(self) -> str:
        """Digits in front of the point."""
        return str(int(self.value))

    @property
    def fraction(self) -> str:
        """Digits behind the point, without zeros at the end."""
        _, _, digits = format(self.value, "f").partition(".")
        return digits.rstrip("0")


def numbers(
    least: Decimal | None = None,
    most: Decimal | None = None,
    *,
    strict: tuple[bool, bool] = (False, False),
    whole: bool = False,
) -> Node:
    """Numbers from `least` to `most`.

    Args:
        least, most: None for no bound.
        strict: whether `least`, and `most`, are outside.
        whole: integers only, written without a point.
    """
    limit = Decimal(10) ** MOST_DIGITS
    low = Bound(-limit, True) if least is None else Bound(least, strict[0])
    high = Bound(limit, True) if most is None else Bound(most, strict[1])
    branches: list[Node] = []
    zero = Bound(Decimal(0))
    if high.value >= 0:
        branches.append(_between(low if low.value >= 0 else zero, high, whole))
    if low.value < 0:
        nearest = Bound(-high.value, high.strict)
        if high.value >= 0:
            nearest = Bound(Decimal(0), True)
        inside = _between(nearest, Bound(-low.value, low.strict), whole)
        if inside != NOTHING:
            branches.append(concat([literal("-"), inside]))
    return choice(each for each in branches if each != NOTHING)


def _digits(first: int, last: int) -> Node:
    return Characters(((48 + first, 48 + last),))


_ANY = _digits(0, 9)


def _between(low: Bound, high: Bound, whole: bool) -> Node:
    """Numbers between two bounds that are not negative."""
    limit = Decimal(10) ** MOST_DIGITS
    if high.value > limit:
        high = Bound(limit, True)
    if low.value > high.value or low.value >= limit:
        return NOTHING
    shortest, longest = len(low.whole), min(len(high.whole), MOST_DIGITS + 1)

    def behind(at_low: bool, at_high: bool) -> Node:
        """What follows digits that are the bounds' own, or not."""
        lower, upper = low if at_low else None, high if at_high else None
        if not whole:
            return _fraction(lower, upper)
        return EMPTY if _whole_fits(lower, upper) else NOTHING

    branches = []
    for length in sorted({shortest, longest}):
        if length > MOST_DIGITS:
            continue
        on_low, on_high = length == shortest, length == longest
        first = low.whole if on_low else "1" + "0" * (length - 1)
        last = high.whole if on_high else "9" * length
        branches.append(_of_length(first, last, on_low, on_high, behind))
    if longest - shortest > 1:
        more = Repeat(_ANY, shortest, longest - 2)
        branches.append(concat([_digits(1, 9), more, behind(False, False)]))
    return choice(each for each in branches if each != NOTHING)


def _whole_fits(low: Bound | None, high: Bound | None) -> bool:
    """Whether the digits in front of the points of these bounds are between them."""
    if low is not None and (low.fraction or low.strict):
        return False
    return high is None or bool(high.fraction) or not high.strict


def _of_length(
    first: str,
    last: str,
    on_low: bool,
    on_high: bool,
    behind: Callable[[bool, bool], Node],
) -> Node:
    """Digits from `first` to `last`, which are equally long, and what is behind them.

    Args:
        on_low, on_high: whether `first`, and `last`, are digits of the bounds.
        behind: whether all digits so far are those of the bounds -> what follows.
    """

    def from_digit(i: int, at_first: bool, at_last: bool) -> Node:
        if i == len(first):
            return behind(at_first and on_low, at_last and on_high)
        if not at_first and not at_last:
            left = len(first) - i
            return concat([Repeat(_ANY, left, left), behind(False, False)])
        low = int(first[i]) if at_first else 0
        high = int(last[i]) if at_last else 9
        if at_first and at_last and low == high:
            return _then(_digits(low, low), from_digit(i + 1, True, True))
        found = []
        if at_first:
            found.append(_then(_digits(low, low), from_digit(i + 1, True, False)))
            low += 1
        inside = high - 1 if at_last else high
        if low <= inside:
            found.append(_then(_digits(low, inside), from_digit(i + 1, False, False)))
        if at_last:
            found.append(_then(_digits(high, high), from_digit(i + 1, False, True)))
        return choice(each for each in found if each != NOTHING)

    return from_digit(0, True, True)


def _then(digit: Node, rest: Node) -> Node:
    return NOTHING if rest == NOTHING else concat([digit, rest])


def _fraction(low: Bound | None, high: Bound | None) -> Node:
    """What may stand behind the whole part: nothing, or a point and digits."""
    digits = _fraction_digits(low, high, 0)
    branches: list[Node] = []
    if digits != NOTHING:
        branches.append(concat([literal("."), digits]))
    if _may_end(low, high, 0):
        branches.append(EMPTY)
    return choice(branches)


def _may_end(low: Bound | None, high: Bound | None, i: int) -> bool:
    """Whether a number may end where it agrees with bounds up to digit `i`."""
    if low is not None and (low.fraction[i:] or low.strict):
        return False
    return high is None or bool(high.fraction[i:]) or not high.strict


def _fraction_digits(low: Bound | None, high: Bound | None, i: int) -> Node:
    """At least one digit behind the point, from digit `i` on.

    Args:
        low, high: the bounds that all digits so far agree with.
        i: digits so far.
    """
    left = MOST_DIGITS - i
    if left <= 0:
        return NOTHING
    if low and not low.fraction[i:] and not low.strict:
        # Whatever follows is no less than nothing.
        low = None
    if low is None and high is None:
        return Repeat(_ANY, 1, left)
    if low is None and high and not high.fraction[i:]:
        # Nothing more, in however many digits.
        return NOTHING if high.strict else Repeat(_digits(0, 0), 1, left)
    first = int((low.fraction[i:] or "0")[0]) if low else 0
    last = int((high.fraction[i:] or "0")[0]) if high else 9
    found: list[Node] = []
    for start, end in _runs(first, last, low is not None, high is not None):
        lower = low if low and start == end == first else None
        upper = high if high and start == end == last else None
        rest = _fraction_digits(lower, upper, i + 1)
        ends = _may_end(lower, upper, i + 1)
        if rest == NOTHING and not ends:
            continue
        more = EMPTY if rest == NOTHING else Repeat(rest, 0 if ends else 1, 1)
        found.append(concat([_digits(start, end), more]))
    return choice(found)


def _runs(first: int, last: int, low: bool, high: bool) -> list[tuple[int, int]]:
    """Digits from `first` to `last` in runs; those of a bound stand alone."""
    runs: list[tuple[int, int]] = []
    if first > last:
        return runs
    if first == last:
        return [(first, first)]
    if low:
        runs.append((first, first))
        first += 1
    inside = last - 1 if high else last
    if first <= inside:
        runs.append((first, inside))
    if high:
        runs.append((last, last))
    return runs
