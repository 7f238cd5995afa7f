# SPDX-License-Identifier: Apache-2.0
"""How errors about options read: what is wrong, what would be right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def unknown(name: object, valid: Iterable[str], *, hint: str = "") -> str:
    """Text about an unknown option: a guess at what was meant, and what is valid.

    Args:
        name: what was given.
        valid: the names that exist.
        hint: a sentence that replaces the guess.
    """
    valid = list(valid)
    if not hint and (close := get_close_matches(str(name), valid, n=1)):
        hint = f"Did you mean {close[0]!r}?"
    parts = [f"unknown option {name!r}.", hint, f"Valid: {', '.join(valid) or 'none'}"]
    return " ".join(part for part in parts if part)


def explain(error: ValidationError) -> str:
    """pydantic's findings in one line: `name: what is wrong, got value`."""
    findings = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] != "value_error":
            message += f", got {item['input']!r}"
        findings.append(f"{name}: {message}" if name else message)
    return "; ".join(findings)


def with_parameters(values: Mapping[str, Any]) -> str:
    """Parameters and their values: `at_least 'scheduled'`."""
    return " and ".join(f"{name} {value!r}" for name, value in values.items())


def _name_of(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        return _name_of(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return " | ".join(str(choice) for choice in get_args(kind))
    if kind is type(None):
        return "none"
    inner = ", ".join(_name_of(part) for part in get_args(kind))
    name = getattr(kind, "__name__", str(kind))
    return f"{name}[{inner}]" if inner else name


def values_of(field: FieldInfo) -> str:
    """What a field may hold, for people: `float, > 0, < 1` or `block | off`."""
    annotation: Any = field.annotation
    union = get_origin(annotation) in (Union, UnionType)
    names = map(_name_of, get_args(annotation) if union else (annotation,))
    limits = [
        f"{sign} {limit:g}"
        for item in field.metadata
        for name, sign in _SIGNS.items()
        if (limit := getattr(item, name, None)) is not None
    ]
    return ", ".join([" | ".join(names), *limits])
