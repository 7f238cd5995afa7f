# SPDX-License-Identifier: Apache-2.0
r"""Texts with holes: `Name: {{city:4}}`, taken apart.

    {{12}}        a hole of twelve tokens
    {{city:4}}    one of four, with a name
    <|mask|>      one of a single token; repeated, they are one hole
    \{{  \<|mask|>    the text {{ or <|mask|> itself
    \\{{          a backslash, and a hole behind it

Everywhere else a backslash is a backslash, and }} is }}.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from vllm_dlm.messages import OptionError, quote

MASK = "<|mask|>"
OPEN, CLOSE = "{{", "}}"

LONGEST_HOLE = 1 << 20
"""Tokens of a hole: more than any context has."""

_MARK = re.compile(r"(\\*)(\{\{|<\|mask\|>)")
_HOLE = re.compile(r"(?:([A-Za-z_][A-Za-z0-9_.-]{0,63}):)?([0-9]{1,7})")
_RULE = "write {{12}} for a hole of 12 tokens, {{city:4}} for one with a name"


class Hole(NamedTuple):
    """A hole in a text."""

    length: int
    """In tokens."""
    name: str | None
    is_mask: bool = False
    """It was written as `<|mask|>`."""


def parse(text: str, set_as: str) -> list[str | Hole]:
    """Take a text with holes apart.

    Args:
        text: see the module docstring.
        set_as: what the option is called where it was set, for messages.

    Returns:
        Pieces of text, none of them empty, and holes, in order. `<|mask|>`s that follow
        each other are one hole.

    Raises:
        OptionError: a hole is written wrongly, or two have the same name.
    """
    parts: list[str | Hole] = []
    names: set[str] = set()
    written, at = "", 0

    def end_piece() -> None:
        nonlocal written
        if written:
            parts.append(written)
        written = ""

    while (mark := _MARK.search(text, at)) is not None:
        slashes, what = mark.groups()
        written += text[at : mark.start()] + "\\" * (len(slashes) // 2)
        at = mark.end()
        if len(slashes) % 2:
            written += what
            continue
        end_piece()
        if what == MASK:
            before = parts[-1] if parts else None
            if isinstance(before, Hole) and before.is_mask:
                parts[-1] = Hole(before.length + 1, None, is_mask=True)
            else:
                parts.append(Hole(1, None, is_mask=True))
            continue
        end = text.find(CLOSE, at)
        inside = text[at:end] if end >= 0 else text[at:]
        found = _HOLE.fullmatch(inside) if end >= 0 else None
        if found is None:
            what = "has no }} behind it" if end < 0 else "is no hole"
            raise OptionError(
                f"{set_as}: {quote(OPEN + inside + (CLOSE if end >= 0 else ''))} "
                f"{what}; {_RULE}, and \\{{{{ for the text {{{{ itself",
                set_as,
            )
        name, length = found[1], int(found[2])
        if not 1 <= length <= LONGEST_HOLE:
            raise OptionError(
                f"{set_as}: a hole of {length} tokens; from 1 to {LONGEST_HOLE} are "
                f"possible, and {_RULE}",
                set_as,
            )
        if name is not None and name in names:
            raise OptionError(
                f"{set_as}: two holes are named {name!r}; give each a name of its own",
                set_as,
            )
        if name is not None:
            names.add(name)
        parts.append(Hole(length, name))
        at = end + len(CLOSE)
    written += text[at:]
    end_piece()
    return parts
