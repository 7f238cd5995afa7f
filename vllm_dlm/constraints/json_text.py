# SPDX-License-Identifier: Apache-2.0
"""How JSON is spelled: strings, constants, and values of any kind.

Of the spellings that JSON has, one is written for each character of a string: itself,
or its short escape (`\\"`, `\\n`, ...). Control characters without a short escape are
not written. Between tokens stands the blank that the caller chooses, or none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_dlm.constraints.limits import ConstraintError
from vllm_dlm.constraints.number_ranges import MOST_DIGITS
from vllm_dlm.constraints.syntax import (
    EMPTY,
    LAST_CODE_POINT,
    Characters,
    Choice,
    Concat,
    Node,
    Ranges,
    Repeat,
    choice,
    complement,
    concat,
    intersect,
    literal,
    only,
    optional,
    parse,
)

ANY_DEPTH = 3
"""Levels of arrays and objects in a value of which the schema says nothing."""

_SHORT = {'"': '"', "\\": "\\", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_ESCAPED: Ranges = ((0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C))
_PLAIN = complement(_ESCAPED)

JSON_BLANKS = ((0x09, 0x0A), (0x0D, 0x0D), (0x20, 0x20))
"""Blank, tab, line feed, carriage return: all that may stand between tokens of JSON."""

BLANK = parse(" ?")
"""What stands between tokens, if nothing else is asked for: a blank, or none."""


def spelled(node: Node) -> Node:
    """A tree over characters as one over how they are spelled in a JSON string."""
    if isinstance(node, Concat):
        return concat(map(spelled, node.parts))
    if isinstance(node, Choice):
        return choice(map(spelled, node.branches))
    if isinstance(node, Repeat):
        return Repeat(spelled(node.part), node.least, node.most)
    plain = intersect(node.ranges, _PLAIN)
    letters = [
        letter
        for character, letter in _SHORT.items()
        if any(first <= ord(character) <= last for first, last in node.ranges)
    ]
    branches: list[Node] = [Characters(plain)] if plain or not letters else []
    if letters:
        codes = sorted(map(ord, letters))
        one_of = Characters(tuple((code, code) for code in codes))
        branches.append(concat([literal("\\"), one_of]))
    return choice(branches)


ANY_CHARACTER = Characters(((0, LAST_CODE_POINT),))


def quoted(node: Node) -> Node:
    """A JSON string whose value matches a tree."""
    return concat([literal('"'), spelled(node), literal('"')])


def constant(value: Any) -> Node:
    """One value, as `json.dumps` writes it, with its blanks."""
    return literal(json.dumps(value, ensure_ascii=False))


NUMBER = parse(
    f"-?(?:0|[1-9][0-9]{{0,{MOST_DIGITS - 1}}})(?:\\.[0-9]{{1,{MOST_DIGITS}}})?"
    "(?:[eE][+-]?[0-9]{1,2})?"
)
STRING = quoted(Repeat(ANY_CHARACTER, 0, None))
BOOLEAN = choice([literal("true"), literal("false")])
NULL = literal("null")


@dataclass(frozen=True)
class Layout:
    """How arrays and objects are written."""

    blank: Node = BLANK
    """Inside of brackets, and behind commas and colons."""

    @classmethod
    def with_blanks(cls, pattern: str) -> Layout:
        """A layout with blanks of the caller's.

        Args:
            pattern: a regular expression; of what it matches, only JSON's blanks are
                written.

        Raises:
            ConstraintError: it is none.
        """
        try:
            return cls(only(parse(pattern), JSON_BLANKS))
        except ConstraintError as error:
            raise ConstraintError(f"whitespace_pattern: {error}") from None

    @property
    def comma(self) -> Node:
        return concat([literal(","), self.blank])

    def member(self, key: Node, value: Node) -> Node:
        """A key and its value."""
        return concat([key, literal(":"), self.blank, value])

    def array(self, inside: Node) -> Node:
        """Brackets around entries, which may be none."""
        return self._between("[", inside, "]")

    def object(self, inside: Node) -> Node:
        """Braces around members, which may be none."""
        return self._between("{", inside, "}")

    def _between(self, opening: str, inside: Node, closing: str) -> Node:
        if inside == EMPTY:
            return literal(opening + closing)
        # The blank stands once where there is nothing between the brackets.
        content = concat([self.blank, inside, self.blank])
        if isinstance(inside, Repeat) and inside.least == 0 and inside.most == 1:
            content = optional(concat([self.blank, inside.part, self.blank]))
        return concat([literal(opening), content, literal(closing)])

    def listed(self, entry: Node, least: int, most: int | None) -> Node:
        """Entries with commas between them, from `least` to `most`."""
        if most == 0:
            return EMPTY
        more = Repeat(
            concat([self.comma, entry]),
            max(least - 1, 0),
            None if most is None else most - 1,
        )
        some = concat([entry, more])
        return some if least else optional(some)

    def in_order(
        self, entries: Sequence[tuple[Node, bool]], least: int, most: int
    ) -> Node:
        """Some of the entries, in their order, with commas between them.

        Args:
            entries: each with whether it has to be there.
            least, most: how many there may be.
        """
        required = sum(must for _, must in entries)
        least, most = max(least, required), min(most, len(entries))
        if least <= max(required, 1) and most == len(entries):
            return self._any_of(entries, empty=least == 0)
        return self._counted(entries, least, most, first=True)

    def _any_of(self, entries: Sequence[tuple[Node, bool]], *, empty: bool) -> Node:
        def behind(rest: Sequence[tuple[Node, bool]]) -> Node:
            return concat(
                concat([self.comma, entry])
                if must
                else optional(concat([self.comma, entry]))
                for entry, must in rest
            )

        if not entries:
            return EMPTY
        anchor = next((i for i, (_, must) in enumerate(entries) if must), None)
        if anchor is not None:
            before = [
                optional(concat([entry, self.comma])) for entry, _ in entries[:anchor]
            ]
            return concat([*before, entries[anchor][0], behind(entries[anchor + 1 :])])
        some = choice(
            concat([entry, behind(entries[i + 1 :])])
            for i, (entry, _) in enumerate(entries)
        )
        return optional(some) if empty else some

    def _counted(
        self,
        entries: Sequence[tuple[Node, bool]],
        least: int,
        most: int,
        *,
        first: bool,
    ) -> Node:
        """As `in_order`, for a number of entries that matters: each way is spelled."""
        if not entries:
            return EMPTY if least <= 0 else Choice(())
        (entry, must), *rest = entries
        branches: list[Node] = []
        if most > 0:
            here = entry if first else concat([self.comma, entry])
            more = self._counted(rest, least - 1, most - 1, first=False)
            if more != Choice(()):
                branches.append(concat([here, more]))
        if not must and least <= len(rest):
            skipped = self._counted(rest, least, most, first=first)
            if skipped != Choice(()):
                branches.append(skipped)
        return choice(branches)

    def anything(self, depth: int = ANY_DEPTH) -> Node:
        """Any value, with at most `depth` levels of arrays and objects."""
        simple = [STRING, NUMBER, BOOLEAN, NULL]
        if depth == 0:
            return choice(simple)
        inner = self.anything(depth - 1)
        member = self.member(STRING, inner)
        return choice(
            [
                *simple,
                self.array(self.listed(inner, 0, None)),
                self.object(self.listed(member, 0, None)),
            ]
        )
