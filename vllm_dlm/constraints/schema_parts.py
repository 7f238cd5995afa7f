# SPDX-License-Identifier: Apache-2.0
"""Strings and numbers of a JSON schema, and how its keywords' values are read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from vllm_dlm.constraints.formats import FORMATS, NUMBER_FORMATS
from vllm_dlm.constraints.json_text import ANY_CHARACTER, NUMBER, STRING, quoted
from vllm_dlm.constraints.keywords import fail
from vllm_dlm.constraints.lengths import at_most, lengths_of
from vllm_dlm.constraints.limits import ConstraintError
from vllm_dlm.constraints.number_ranges import NOTHING, numbers
from vllm_dlm.constraints.syntax import Node, Repeat, parse


def string_node(schema: Mapping[str, Any], path: str) -> Node:
    least, most = counts(schema, "minLength", "maxLength", path)
    pattern, name = schema.get("pattern"), schema.get("format")
    if pattern is None and name is None:
        if (least, most) == (0, None):
            return STRING
        return quoted(repeat(ANY_CHARACTER, least, most))
    if pattern is not None and name is not None:
        raise fail(path, "pattern and format together are not supported; use one")
    if pattern is not None:
        if not isinstance(pattern, str):
            raise fail(path, "pattern is a text")
        try:
            node = parse(pattern)
        except ConstraintError as error:
            raise fail(path, f"pattern: {error}") from None
    elif name in FORMATS:
        node = parse(FORMATS[name])
    else:
        raise fail(
            path, f"format {name!r} is none of {', '.join(FORMATS)}; use pattern"
        )
    node = at_most(node, least, most)
    shortest, longest = lengths_of(node)
    if shortest < least or (most is not None and (longest or most + 1) > most):
        raise fail(
            path,
            f"{'pattern' if name is None else 'format'} matches texts of "
            f"{shortest} to {'any number of' if longest is None else longest} "
            "characters, and minLength and maxLength beside it are not supported "
            "unless they say the same: write the lengths into the pattern",
        )
    return quoted(node)


def number_node(schema: Mapping[str, Any], path: str, *, whole: bool) -> Node:
    low, low_strict = bound(schema, "minimum", "exclusiveMinimum", max, path)
    high, high_strict = bound(schema, "maximum", "exclusiveMaximum", min, path)
    step = schema.get("multipleOf")
    if step is not None:
        if step != 1 or isinstance(step, bool):
            raise fail(path, "multipleOf is not supported, unless it is 1")
        whole = True
    name = schema.get("format")
    if name is not None:
        if name not in NUMBER_FORMATS:
            raise fail(
                path,
                f"format {name!r} of numbers is none of "
                f"{', '.join(NUMBER_FORMATS)}; use minimum and maximum",
            )
        limits = NUMBER_FORMATS[name]
        if limits:
            least, most = map(Decimal, limits)
            if low is None or low < least:
                low, low_strict = least, False
            if high is None or high > most:
                high, high_strict = most, False
    if not whole and low is None and high is None:
        return NUMBER
    return numbers(low, high, strict=(low_strict, high_strict), whole=whole)


def repeat(node: Node, least: int, most: int | None) -> Node:
    if most is not None and least > most:
        return NOTHING
    return Repeat(node, least, most)


def counts(
    schema: Mapping[str, Any], least: str, most: str, path: str
) -> tuple[int, int | None]:
    """Two keywords that count something."""
    found = []
    for name in (least, most):
        value = schema.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 0
        ):
            raise fail(path, f"{name} is a number of at least 0, got {value!r}")
        found.append(value)
    return found[0] or 0, found[1]


def bound(
    schema: Mapping[str, Any], name: str, strict_name: str, tighter: Any, path: str
) -> tuple[Decimal | None, bool]:
    """A bound of numbers, and whether it is outside."""
    bounds = []
    for each in (name, strict_name):
        value = schema.get(each)
        if isinstance(value, bool) and each == strict_name:
            raise fail(
                path,
                f"{strict_name} is a number (as in draft 6 and later), got {value}",
            )
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise fail(path, f"{each} is a number, got {value!r}")
        number = Decimal(repr(value))
        if not number.is_finite() or number.adjusted() < -18:
            raise fail(path, f"{each}: {value!r} is not supported")
        bounds.append((number, each == strict_name))
    if not bounds:
        return None, False
    value = tighter(bound for bound, _ in bounds)
    return value, any(strict for bound, strict in bounds if bound == value)


def mapping(schema: Mapping[str, Any], name: str, path: str) -> dict[str, Any]:
    value = schema.get(name, {})
    if not isinstance(value, Mapping):
        raise fail(path, f"{name} is an object of schemas")
    return dict(value)


def searches(pattern: str, key: str, path: str) -> bool:
    try:
        return re.search(pattern, key) is not None
    except re.error as error:
        raise fail(path, f"patternProperties {json.dumps(pattern)}: {error}") from None
