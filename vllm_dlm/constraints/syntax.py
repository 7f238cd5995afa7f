# SPDX-License-Identifier: Apache-2.0
"""Regular expressions as trees: read with Python's own parser, and written again.

What Python's `re` can say and no finite machine can (look-around, back-references), and
what depends on more than the text (flags), is refused by name. `\\d`, `\\w` and `\\s`
are those of ASCII, as in JSON Schema's dialect. The whole text must match, so that `^`
in front and `$` at the end say nothing; elsewhere they are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, TypeAlias

from vllm_dlm.constraints.limits import ConstraintError

LAST_CODE_POINT = 0x10FFFF

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Code points: sorted, disjoint intervals, both ends included."""


@dataclass(frozen=True)
class Characters:
    """One character out of a set."""

    ranges: Ranges


@dataclass(frozen=True)
class Concat:
    """Parts one after another; no part is the empty text."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """One of several branches; no branch is no text at all."""

    branches: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """A part several times."""

    part: Node
    least: int
    most: int | None
    """None for any number."""


Node: TypeAlias = Characters | Concat | Choice | Repeat

EMPTY: Node = Concat(())
"""The empty text."""

NO_TEXT = "[^\\x00-\\U0010ffff]"
"""The expression that matches nothing: one character, but none of all."""


def characters(ranges: Iterable[tuple[int, int]]) -> Characters:
    """A set of characters from intervals in any order, which may overlap."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return Characters(tuple(merged))


def complement(ranges: Ranges) -> Ranges:
    """All other code points."""
    left, start = [], 0
    for first, last in ranges:
        if start < first:
            left.append((start, first - 1))
        start = last + 1
    if start <= LAST_CODE_POINT:
        left.append((start, LAST_CODE_POINT))
    return tuple(left)


def intersect(one: Ranges, other: Ranges) -> Ranges:
    """Code points that are in both."""
    return complement(
        characters((*complement(one), *complement(other))).ranges,
    )


_DIGIT: Ranges = ((0x30, 0x39),)
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Ranges = ((0x09, 0x0D), (0x20, 0x20))
_CATEGORIES: dict[Any, Ranges] = {
    codes.CATEGORY_DIGIT: _DIGIT,
    codes.CATEGORY_NOT_DIGIT: complement(_DIGIT),
    codes.CATEGORY_WORD: _WORD,
    codes.CATEGORY_NOT_WORD: complement(_WORD),
    codes.CATEGORY_SPACE: _SPACE,
    codes.CATEGORY_NOT_SPACE: complement(_SPACE),
}
_NEWLINE: Ranges = ((0x0A, 0x0A),)

_REFUSED = {
    codes.ASSERT: "look-around, as in (?=...) or (?<=...)",
    codes.ASSERT_NOT: "look-around, as in (?!...) or (?<!...)",
    codes.GROUPREF: "a back-reference, as in \\1 or (?P=name)",
    codes.GROUPREF_EXISTS: "a conditional group, as in (?(1)...)",
    codes.ATOMIC_GROUP: "an atomic group, as in (?>...)",
    codes.POSSESSIVE_REPEAT: "a possessive repetition, as in a*+",
}
_BEGINNINGS = (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING)
_ENDS = (codes.AT_END, codes.AT_END_STRING)


def parse(pattern: str) -> Node:
    """Read a regular expression.

    Args:
        pattern: in the syntax of Python's `re`, without flags.

    Raises:
        ConstraintError: it is none, or has what no finite machine can decide.
    """
    try:
        parsed = parser.parse(pattern)
        if parsed.state.flags & ~re.UNICODE:
            raise ConstraintError(
                "regex: inline flags, as in (?i), are not supported; write the "
                "characters out, as in [aA]"
            )
        return _sequence(parsed, True, True)
    except re.error as error:
        raise ConstraintError(f"regex: {error}") from None
    except (RecursionError, OverflowError):
        raise ConstraintError("regex: groups are nested too deeply") from None


def _sequence(items: Sequence[Any], first: bool, last: bool) -> Node:
    """A tree of what Python has parsed.

    Args:
        items: pairs of a code and its argument.
        first, last: whether the whole text begins, and ends, with these items.
    """
    items = list(items)
    if first:
        while items and items[0][0] is codes.AT and items[0][1] in _BEGINNINGS:
            del items[0]
    if last:
        while items and items[-1][0] is codes.AT and items[-1][1] in _ENDS:
            del items[-1]
    nodes = [
        _item(code, argument, first and i == 0, last and i == len(items) - 1)
        for i, (code, argument) in enumerate(items)
    ]
    return concat(nodes)


def _item(code: Any, argument: Any, first: bool, last: bool) -> Node:
    if code is codes.LITERAL:
        return Characters(((argument, argument),))
    if code is codes.NOT_LITERAL:
        return Characters(complement(((argument, argument),)))
    if code is codes.ANY:
        return Characters(complement(_NEWLINE))
    if code is codes.IN:
        return _character_class(argument)
    if code is codes.BRANCH:
        return choice(_sequence(branch, first, last) for branch in argument[1])
    if code is codes.SUBPATTERN:
        _, added, removed, inside = argument
        if added or removed:
            raise ConstraintError(
                "regex: inline flags, as in (?i:...), are not supported; write the "
                "characters out, as in [aA]"
            )
        return _sequence(inside, first, last)
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
        least, most, inside = argument
        # Whether the repetition is greedy decides which groups match, not what does.
        bound = None if most is codes.MAXREPEAT else most
        return Repeat(_sequence(inside, False, False), least, bound)
    if code is codes.AT:
        name = {codes.AT_BOUNDARY: "\\b", codes.AT_NON_BOUNDARY: "\\B"}.get(argument)
        what = f"{name} is" if name else "^ and $ inside are"
        raise ConstraintError(
            f"regex: {what} not supported; the whole text has to match, so anchors "
            "are not needed"
        )
    what = _REFUSED.get(code, str(code).lower())
    raise ConstraintError(
        f"regex: {what}, is not regular and not supported; write the alternatives out"
    )


def _character_class(items: Iterable[Any]) -> Node:
    found: list[tuple[int, int]] = []
    negated = False
    for code, argument in items:
        if code is codes.NEGATE:
            negated = True
        elif code is codes.LITERAL:
            found.append((argument, argument))
        elif code is codes.RANGE:
            found.append(argument)
        else:
            found.extend(_CATEGORIES[argument])
    node = characters(found)
    return Characters(complement(node.ranges)) if negated else node


def concat(nodes: Iterable[Node]) -> Node:
    """Parts one after another."""
    parts: list[Node] = []
    for node in nodes:
        parts.extend(node.parts if isinstance(node, Concat) else (node,))
    return parts[0] if len(parts) == 1 else Concat(tuple(parts))


def choice(nodes: Iterable[Node]) -> Node:
    """One of several branches."""
    branches = tuple(nodes)
    return branches[0] if len(branches) == 1 else Choice(branches)


def only(node: Node, ranges: Ranges) -> Node:
    """A tree without the characters that are in none of the ranges."""
    if isinstance(node, Characters):
        return Characters(intersect(node.ranges, ranges))
    if isinstance(node, Concat):
        return concat(only(part, ranges) for part in node.parts)
    if isinstance(node, Choice):
        return choice(only(branch, ranges) for branch in node.branches)
    return Repeat(only(node.part, ranges), node.least, node.most)


def optional(node: Node) -> Node:
    """A part that may be left out."""
    return Repeat(node, 0, 1)


def literal(text: str) -> Node:
    """A text as it stands."""
    return concat(Characters(((ord(each), ord(each)),)) for each in text)


def write(node: Node) -> str:
    """A tree as a regular expression, which `parse` reads as the same language."""
    if isinstance(node, Characters):
        return _write_characters(node.ranges)
    if isinstance(node, Concat):
        return "".join(
            f"(?:{write(part)})" if isinstance(part, Choice) else write(part)
            for part in node.parts
        )
    if isinstance(node, Choice):
        return "|".join(map(write, node.branches)) or NO_TEXT
    inside = write(node.part)
    if not isinstance(node.part, Characters):
        inside = f"(?:{inside})"
    if node.least == node.most:
        return inside if node.least == 1 else f"{inside}{{{node.least}}}"
    if (node.least, node.most) == (0, 1):
        return f"{inside}?"
    if node.most is None and node.least < 2:
        return inside + "*+"[node.least]
    return f"{inside}{{{node.least},{'' if node.most is None else node.most}}}"


def _write_characters(ranges: Ranges) -> str:
    if not ranges:
        return NO_TEXT
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return _escape(ranges[0][0])
    negated = ranges[-1][1] == LAST_CODE_POINT and ranges[0][0] == 0
    shown = complement(ranges) if negated else ranges
    if not shown:
        return "[\\x00-\\U0010ffff]"
    inside = "".join(
        _escape(first) if first == last else f"{_escape(first)}-{_escape(last)}"
        for first, last in shown
    )
    return f"[{'^' if negated else ''}{inside}]"


def _escape(code: int) -> str:
    letter = chr(code)
    if letter.isalnum() and code < 128:
        return letter
    if 32 <= code < 127:
        return letter if letter in " \"',:;<>=!@%_`/" else f"\\{letter}"
    if code < 256:
        return f"\\x{code:02x}"
    if code < 0x10000:
        return f"\\u{code:04x}"
    return f"\\U{code:08x}"
