# SPDX-License-Identifier: Apache-2.0
"""The wording of errors about options: what is wrong, and what would be right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic.fields import FieldInfo

_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}

MOST_FINDINGS = 3
"""Findings of one validation that a message names; it counts the others."""

LONGEST_QUOTE = 80
"""Characters of a value, and of a name, that a message repeats."""

LONGEST_MESSAGE = 2000
"""Characters of a message: its length must not depend on what a client sent."""

_MOST_ENTRIES = 3
_LONGEST_GUESS = 64
"""Characters of a name for which a similar one is looked for."""


class OptionError(ValueError):
    """What somebody set is not valid.

    Args:
        message: what is wrong, and what would be right.
        field: the option that is to blame, by the name that it was set under.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def quote(value: object, depth: int = 2) -> str:
    """A value as a message repeats it: its `repr`, cut short where it is long.

    A long value costs no more time than a short one.

    Args:
        value: anything that a client or a user has set.
        depth: how many levels of lists and objects are shown.
    """
    if isinstance(value, str):
        if len(value) <= LONGEST_QUOTE:
            return repr(value)
        return f"{value[:LONGEST_QUOTE]!r}... ({len(value)} characters)"
    if isinstance(value, bytes | bytearray):
        return f"<{len(value)} bytes>"
    if isinstance(value, bool | float | None):
        return repr(value)
    if isinstance(value, int):
        if value.bit_length() <= 2 * LONGEST_QUOTE:
            return repr(value)
        return f"<a number of {value.bit_length()} bits>"
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        return _quote_entries(value, depth)
    return f"<{type(value).__name__}>"


def _quote_entries(value: Any, depth: int) -> str:
    if depth == 0:
        return f"<{type(value).__name__} of {len(value)}>"
    first = list(islice(value, _MOST_ENTRIES))
    if isinstance(value, Mapping):
        parts = [f"{quote(key, 0)}: {quote(value[key], depth - 1)}" for key in first]
    else:
        parts = [quote(entry, depth - 1) for entry in first]
    if len(value) > len(first):
        parts.append(f"... ({len(value)} entries)")
    opening, closing = "[]" if isinstance(value, Sequence) else "{}"
    return f"{opening}{', '.join(parts)}{closing}"


def name_of(name: object) -> str:
    """A name as a message shows it, without quotes; its length is bounded, as by
    `quote`."""
    text = str(name)
    if len(text) > LONGEST_QUOTE or not text.isprintable():
        return quote(text)
    return text


def bounded(message: str) -> str:
    """A message that any client can be sent: of bounded length, and valid UTF-8."""
    if len(message) > LONGEST_MESSAGE:
        left_out = len(message) - LONGEST_MESSAGE
        message = f"{message[:LONGEST_MESSAGE]}... ({left_out} more characters)"
    return message.encode("utf-8", "backslashreplace").decode("utf-8")


def unknown(name: object, valid: Iterable[str], *, hint: str = "") -> str:
    """The text about an unknown option: what may have been meant, and what is valid.

    Args:
        name: what was given.
        valid: the names that exist.
        hint: a sentence that replaces the guess.
    """
    valid = list(valid)
    if not hint and (close := closest(name, valid)):
        hint = f"Did you mean {close!r}?"
    parts = [
        f"unknown option {quote(name)}.",
        hint,
        f"Valid: {', '.join(valid) or 'none'}",
    ]
    return " ".join(part for part in parts if part)


def closest(name: object, valid: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The valid name that is most like `name`, if one is at all."""
    text = str(name)
    if len(text) > _LONGEST_GUESS:
        return None
    return next(iter(get_close_matches(text, valid, n=1, cutoff=cutoff)), None)


def explain(error: ValidationError, names: Mapping[str, str] | None = None) -> str:
    """The first findings of pydantic in one line: `name: what is wrong, got value`.

    Args:
        error: what pydantic found.
        names: field -> the name that it was set under, where that is another one.
    """
    findings = []
    for item in error.errors(include_url=False)[:MOST_FINDINGS]:
        name = ".".join(
            name_of(part) for part in (_field(item, names), *item["loc"][1:])
        )
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] != "value_error":
            message += f", got {quote(item['input'])}"
        findings.append(f"{name}: {message}" if name else message)
    if (others := error.error_count() - MOST_FINDINGS) > 0:
        findings.append(f"and {others} more")
    return bounded("; ".join(findings))


def with_parameters(values: Mapping[str, Any]) -> str:
    """Parameters and their values: `at_least 'scheduled'`."""
    return " and ".join(f"{name} {value!r}" for name, value in values.items())


def first_field(error: ValidationError, names: Mapping[str, str]) -> str | None:
    """The name that the field of the first finding was set under; None if the finding
    is about no single field."""
    [first] = error.errors(include_url=False)[:1]
    return _field(first, names) or None


def _field(item: Any, names: Mapping[str, str] | None) -> str:
    if not item["loc"]:
        return ""
    field = str(item["loc"][0])
    return (names or {}).get(field, field)


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        return _type_name(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return " | ".join(str(choice) for choice in get_args(kind))
    if kind is type(None):
        return "none"
    inner = ", ".join(_type_name(part) for part in get_args(kind))
    name = getattr(kind, "__name__", str(kind))
    return f"{name}[{inner}]" if inner else name


def values_of(field: FieldInfo) -> str:
    """What a field may hold, for people: `float, > 0, < 1` or `block | off`."""
    annotation: Any = field.annotation
    union = get_origin(annotation) in (Union, UnionType)
    names = map(_type_name, get_args(annotation) if union else (annotation,))
    limits = [
        f"{sign} {limit:g}"
        for item in field.metadata
        for name, sign in _SIGNS.items()
        if (limit := getattr(item, name, None)) is not None
    ]
    return ", ".join([" | ".join(names), *limits])


def metavar_of(field: FieldInfo) -> str:
    """What a flag's help calls a field's value: `N`, `JSON`, `{block,off}`."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "metavar" in extra:
        return str(extra["metavar"])
    words = list(_words(field.annotation))
    return words[0] if len(words) == 1 else f"{{{','.join(words)}}}"


def _words(kind: Any) -> Iterator[str]:
    """What stands for a value of a type on a command line, per kind of value."""
    if get_origin(kind) is Annotated:
        yield from _words(get_args(kind)[0])
    elif get_origin(kind) in (Union, UnionType):
        for part in get_args(kind):
            yield from _words(part)
    elif get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
    elif kind in (int, float):
        yield "N"
    elif kind is not type(None):
        yield "JSON"
