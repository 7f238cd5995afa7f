# SPDX-License-Identifier: Apache-2.0
"""Grammars whose language is regular, in the notation that vLLM's backends take.

    root  ::= item (", " item)*     # rules of any names; the text is a `root`
    item  ::= "x" | [0-9]{1,3} | list
    list  ::= "." list | ";"

Rules are put into one another. One that contains itself may do so at the beginning or
at the end of its alternatives, which is a repetition; anywhere else it would have to
count, which no automaton can.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from vllm_dlm.constraints.limits import ConstraintError
from vllm_dlm.constraints.syntax import (
    LAST_CODE_POINT,
    Characters,
    Node,
    Repeat,
    characters,
    choice,
    complement,
    concat,
    literal,
)
from vllm_dlm.messages import quote

START = "root"
MOST_PARTS = 20_000
"""Parts of all rules together, references counted each time."""
_DEEPEST = 64

_TOKEN = re.compile(
    r"""(?P<blank>\s+|\#[^\n]*)
    |(?P<name>[A-Za-z_][\w.-]*)(?P<defines>\s*::=)?
    |(?P<text>"(?:[^"\\\n]|\\.)*")
    |(?P<set>\[\^?(?:[^\]\\]|\\.)*\])
    |(?P<repeat>\{\s*\d+\s*(?:,\s*\d*\s*)?\})
    |(?P<sign>[|()*+?.])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(
    r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.DOTALL
)
_LETTERS = {"n": "\n", "r": "\r", "t": "\t", "0": "\0"}
_TIMES = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class _Token(NamedTuple):
    kind: str
    text: str


@dataclass(frozen=True)
class _Reference:
    """A rule, by its name."""

    name: str


@dataclass(frozen=True)
class _Group:
    """Alternatives, each a sequence, and how often they come."""

    alternatives: tuple[tuple[_Item, ...], ...]
    least: int = 1
    most: int | None = 1


_Item: TypeAlias = "Node | _Reference | _Group"


def grammar_node(text: str) -> Node:
    """What a grammar matches, as the tree of a regular expression.

    Raises:
        ConstraintError: it is no grammar, or not a regular one; it names the rule.
    """
    rules = _parse(text)
    if START not in rules:
        raise ConstraintError(
            f"grammar: there is no rule {START!r}, which the text has to be"
        )
    return _Resolver(rules).rule(START)


# -- reading ---------------------------------------------------------------


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            line = text.count("\n", 0, at) + 1
            raise ConstraintError(
                f"grammar: line {line}: {quote(text[at : at + 20])} cannot be read; "
                'rules are written as: name ::= "text" | [a-z]+ other_name'
            )
        at = found.end()
        if found["defines"]:
            yield _Token("rule", found["name"])
        elif found.lastgroup != "blank":
            assert found.lastgroup is not None
            yield _Token(found.lastgroup, found[0])


def _parse(text: str) -> dict[str, _Group]:
    rules: dict[str, _Group] = {}
    tokens = [*_tokens(text), _Token("end", "")]
    at = 0
    while tokens[at].kind != "end":
        kind, name = tokens[at]
        if kind != "rule":
            raise ConstraintError(
                f"grammar: {quote(name)} stands outside of a rule (name ::= ...)"
            )
        if name in rules:
            raise ConstraintError(f"grammar: two rules are named {quote(name)}")
        rules[name], at = _group(tokens, at + 1, name, 0)
        if tokens[at].text == ")":
            raise ConstraintError(f"grammar: rule {quote(name)}: a ) without its (")
    return rules


def _group(tokens: list[_Token], at: int, rule: str, depth: int) -> tuple[_Group, int]:
    """Alternatives from a token on; also where they end."""
    if depth > _DEEPEST:
        raise ConstraintError(f"grammar: rule {quote(rule)} is nested too deeply")
    alternatives: list[list[_Item]] = [[]]
    while True:
        kind, text = tokens[at]
        if kind in ("end", "rule") or text == ")" and kind == "sign":
            return _Group(tuple(map(tuple, alternatives))), at
        at += 1
        if text == "|" and kind == "sign":
            alternatives.append([])
            continue
        item: _Item
        if text == "(" and kind == "sign":
            item, at = _group(tokens, at, rule, depth + 1)
            if tokens[at].text != ")" or tokens[at].kind != "sign":
                raise ConstraintError(f"grammar: rule {quote(rule)}: a ( without its )")
            at += 1
        elif kind == "name":
            item = _Reference(text)
        elif kind == "text":
            item = literal(_plain(text[1:-1]))
        elif kind == "set":
            item = _set(text[1:-1], rule)
        elif text == ".":
            item = Characters(((0, LAST_CODE_POINT),))
        else:
            raise ConstraintError(
                f"grammar: rule {quote(rule)}: nothing stands in front of {text}"
            )
        while (times := _times(tokens[at], rule)) is not None:
            item, at = _Group(((item,),), *times), at + 1
        alternatives[-1].append(item)


def _times(token: _Token, rule: str) -> tuple[int, int | None] | None:
    """How often a token says that what stands in front of it comes."""
    if token.kind == "sign":
        return _TIMES.get(token.text)
    if token.kind != "repeat":
        return None
    low, comma, high = token.text[1:-1].replace(" ", "").partition(",")
    least = int(low)
    most = (int(high) if high else None) if comma else least
    if most is not None and most < least:
        raise ConstraintError(
            f"grammar: rule {quote(rule)}: {token.text} ends before it begins"
        )
    return least, most


def _plain(text: str) -> str:
    """A text without its escapes."""

    def letter(found: re.Match[str]) -> str:
        number = found[1] or found[2] or found[3]
        if number is None:
            return _LETTERS.get(found[4], found[4])
        if int(number, 16) > LAST_CODE_POINT:
            raise ConstraintError(f"grammar: {found[0]} is no character")
        return chr(int(number, 16))

    return _ESCAPE.sub(letter, text)


def _set(inside: str, rule: str) -> Characters:
    """The characters of a class, `^a-z` say."""
    negated = inside.startswith("^")
    letters: list[tuple[str, bool]] = []  # and whether it was escaped
    at = int(negated)
    while at < len(inside):
        found = _ESCAPE.match(inside, at)
        piece = found[0] if found else inside[at]
        letters.append((_plain(piece), found is not None))
        at += len(piece)
    ranges, i = [], 0
    while i < len(letters):
        first = last = ord(letters[i][0])
        if i + 2 < len(letters) and letters[i + 1] == ("-", False):
            last = ord(letters[i + 2][0])
            i += 2
        if last < first:
            raise ConstraintError(
                f"grammar: rule {quote(rule)}: [{inside}] has a range that ends "
                "before it begins"
            )
        ranges.append((first, last))
        i += 1
    node = characters(ranges)
    return Characters(complement(node.ranges)) if negated else node


# -- putting rules into one another ----------------------------------------


@dataclass
class _Resolver:
    rules: dict[str, _Group]
    _done: dict[str, tuple[Node, int]] = field(default_factory=dict)
    """Name -> its tree, and how many parts that has."""
    _inside: list[str] = field(default_factory=list)
    """Rules that are being put together, from the outside in."""
    _parts: int = 0

    def rule(self, name: str) -> Node:
        """The tree of a rule."""
        if name in self._done:
            node, parts = self._done[name]
            self._count(parts)
            return node
        if name not in self.rules:
            raise ConstraintError(
                f"grammar: rule {quote(self._inside[-1])} names {quote(name)}, and "
                "there is no such rule"
            )
        if name in self._inside:
            cycle = [*self._inside[self._inside.index(name) :], name]
            raise ConstraintError(
                f"grammar: {' -> '.join(map(quote, cycle))} contains itself, other "
                "than at the beginning or the end of a rule's own alternatives: it is "
                "not regular and not supported; write out as many levels as are needed"
            )
        before = self._parts
        self._inside.append(name)
        node = self._repeated(name, self.rules[name].alternatives)
        self._inside.pop()
        self._done[name] = node, self._parts - before
        return node

    def _repeated(self, name: str, alternatives: tuple[tuple[_Item, ...], ...]) -> Node:
        """A rule that may begin or end with itself: X = X a | b X | c is b* c a*."""
        own = _Reference(name)
        before, behind, once = [], [], []
        for items in alternatives:
            if items == (own,):
                continue
            if items and items[0] == own:
                behind.append(self._sequence(items[1:]))
            elif items and items[-1] == own:
                before.append(self._sequence(items[:-1]))
            else:
                once.append(self._sequence(items))
        if not once:
            raise ConstraintError(f"grammar: rule {quote(name)} never ends")
        return concat(
            [
                *([Repeat(choice(before), 0, None)] if before else []),
                choice(once),
                *([Repeat(choice(behind), 0, None)] if behind else []),
            ]
        )

    def _sequence(self, items: tuple[_Item, ...]) -> Node:
        return concat(map(self._item, items))

    def _item(self, item: _Item) -> Node:
        self._count(1)
        if isinstance(item, _Reference):
            return self.rule(item.name)
        if isinstance(item, _Group):
            node = choice(map(self._sequence, item.alternatives))
            once = (item.least, item.most) == (1, 1)
            return node if once else Repeat(node, item.least, item.most)
        return item

    def _count(self, parts: int) -> None:
        self._parts += parts
        if self._parts > MOST_PARTS:
            raise ConstraintError(
                f"grammar: its rules, put into one another, have more than "
                f"{MOST_PARTS} parts; name fewer rules several times"
            )
