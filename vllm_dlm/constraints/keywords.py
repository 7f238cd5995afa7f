# SPDX-License-Identifier: Apache-2.0
"""The keywords and types of JSON schemas, and which values are equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_dlm.constraints.formats import NUMBER_FORMATS
from vllm_dlm.constraints.limits import ConstraintError

Schema = Mapping[str, Any] | bool

MOST_COUNTED = 8
"""Entries of which each number of ways to choose is spelled out."""
MOST_SCHEMAS = 2_000
"""Schemas inside of one, counted again wherever a reference names them."""
ANYTHING = 100
"""For how many a schema counts of which any value is valid."""
DEEPEST = 64
"""Levels of schemas inside schemas."""

OF_TYPE = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": (
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
        *("multipleOf", "format"),
    ),
    "array": (
        *("items", "prefixItems", "additionalItems", "minItems", "maxItems"),
        "uniqueItems",
    ),
    "object": (
        *("properties", "required", "additionalProperties", "patternProperties"),
        *("propertyNames", "minProperties", "maxProperties"),
    ),
}
"""Type of values -> the keywords that are about it."""
OF_TYPE["integer"] = OF_TYPE["number"]
_GENERAL = ("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref")
KNOWN = {*_GENERAL, *(name for names in OF_TYPE.values() for name in names)}
"""All keywords that are kept."""


def fail(path: str, what: str) -> ConstraintError:
    """The error about a place of a schema."""
    return ConstraintError(f"json schema, {path}: {what}")


def types_of(schema: Mapping[str, Any], path: str) -> list[str] | None:
    """The types that a schema names; None where it names none."""
    named = schema.get("type")
    if named is None:
        return None
    types = [named] if isinstance(named, str) else named
    if not isinstance(types, list) or not types:
        raise fail(path, f"type is a name or a list of names, got {named!r}")
    for name in types:
        if name not in TYPES:
            raise fail(path, f"type {name!r} is none of {', '.join(TYPES)}")
    return types


TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")


def written_types(schema: Mapping[str, Any], path: str) -> list[str] | None:
    """The types of the values that are written for a schema; None for any.

    Where a schema names none, the types that its other keywords are about.
    """
    types = types_of(schema, path)
    if types is None:
        types = [kind for kind in TYPES if kind != "integer" and _about(schema, kind)]
    elif "number" in types:
        types = [kind for kind in types if kind != "integer"]
    return types or None


def _about(schema: Mapping[str, Any], kind: str) -> bool:
    """Whether a keyword of the schema is about values of a type."""
    names = [name for name in OF_TYPE.get(kind, ()) if name in schema]
    if "format" in names and (schema["format"] in NUMBER_FORMATS) != (kind != "string"):
        names.remove("format")
    return bool(names)


def is_among(value: Any, values: list[Any]) -> bool:
    """Whether a JSON value is one of several: 1 is 1.0, but is not true."""
    return any(same(value, each) for each in values)


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(
            same(value, other[key]) for key, value in one.items()
        )
    return bool(one == other)


def type_of(value: Any) -> str:
    """The name of a JSON value's type."""
    for kind, name in (
        *((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string")),
        *((list, "array"), (dict, "object")),
    ):
        if isinstance(value, kind):
            return name
    return "null"


def has_type(value: Any, types: list[str] | None) -> bool:
    """Whether a JSON value is of one of the types; None for any."""
    if types is None or type_of(value) in types:
        return True
    if type_of(value) == "integer":
        return "number" in types
    return type_of(value) == "number" and value.is_integer() and "integer" in types


def common_types(one: Any, other: Any) -> list[str]:
    """Types of both; an integer is a number too."""
    first = [one] if isinstance(one, str) else one
    second = [other] if isinstance(other, str) else other
    common = [each for each in first if each in second]
    if "integer" not in common and (
        ("integer" in first and "number" in second)
        or ("number" in first and "integer" in second)
    ):
        common.append("integer")
    return common
