# SPDX-License-Identifier: Apache-2.0
"""Several JSON schemas as one: references, `allOf`, and branches with what is beside.

A schema is known here by its keywords alone. What cannot be said by keywords of one
schema is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_dlm.constraints.keywords import (
    Schema,
    common_types,
    fail,
    has_type,
    is_among,
    types_of,
    written_types,
)

ANNOTATIONS = frozenset(
    {
        *("title", "description", "default", "examples", "example", "deprecated"),
        *("readOnly", "writeOnly", "$comment", "$schema", "$defs", "definitions"),
        *("contentMediaType", "contentEncoding", "contentSchema"),
    }
)
"""Keywords that say nothing about which values are valid. `$defs` are looked up."""


def assertions(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema without its annotations, and without names that begin with `x-`."""
    return {
        name: value
        for name, value in schema.items()
        if name not in ANNOTATIONS and not name.startswith("x-")
    }


def look_up(root: Schema, reference: Any, path: str) -> Schema:
    """The schema that a reference names.

    Raises:
        ConstraintError: it names another document, or nothing.
    """
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise fail(
            path,
            f"$ref {json.dumps(reference)} is not in this document; only references "
            'such as "#/$defs/name" are supported: put what they name into $defs',
        )
    found: Any = root
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdigit() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, Mapping) and name in found:
            found = found[name]
        else:
            raise fail(path, f"$ref {json.dumps(reference)} names nothing")
    return checked(found, path)


def checked(schema: Any, path: str) -> Schema:
    """A value as a schema.

    Raises:
        ConstraintError: it is neither an object nor true or false.
    """
    if isinstance(schema, bool | Mapping):
        return schema
    raise fail(path, "a schema is an object, true or false")


_LEAST = {
    *("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"),
}
_MOST = {
    *("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"),
}


def refuse_cycle(root: Schema, name: Any, path: str) -> None:
    """Refuse a reference to a schema that contains itself.

    Raises:
        ConstraintError: it names the references that lead back.
    """
    ways: list[tuple[Any, ...]] = [(name,)]
    seen = set()
    for way in ways:
        for inner in _references(look_up(root, way[-1], path)):
            if inner == name:
                cycle = " -> ".join(map(str, (*way, name)))
                raise fail(
                    path,
                    f"the schema contains itself ({cycle}), and values of any depth "
                    "are not supported; write the levels out",
                )
            if inner not in seen:
                seen.add(inner)
                ways.append((*way, inner))


def _references(value: Any) -> Iterator[str]:
    """The references in a schema, but for those of its definitions."""
    if isinstance(value, list):
        for each in value:
            yield from _references(each)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if name == "$ref" and isinstance(inner, str):
                yield inner
            elif name not in ("$defs", "definitions", "const", "enum", "default"):
                yield from _references(inner)


def merge(one: Schema, other: Schema, path: str) -> Schema:
    """A schema that holds exactly where both do.

    Raises:
        ConstraintError: no keywords of one schema say so.
    """
    if isinstance(one, bool):
        return other if one else False
    if isinstance(other, bool):
        return one if other else False
    merged = assertions(one)
    for name, value in assertions(other).items():
        if name not in merged or merged[name] == value:
            merged[name] = value
        elif name == "type":
            merged[name] = common_types(merged[name], value)
        elif name in _LEAST:
            merged[name] = max(merged[name], value)
        elif name in _MOST:
            merged[name] = min(merged[name], value)
        elif name == "required":
            merged[name] = list(dict.fromkeys([*merged[name], *value]))
        elif name in ("properties", "patternProperties"):
            merged[name] = {**merged[name]}
            for key, schema in value.items():
                inner = f"{path}/{name}/{key}"
                known = merged[name].get(key, True)
                merged[name][key] = merge(known, checked(schema, inner), inner)
        elif name in ("items", "additionalProperties", "propertyNames"):
            inner = f"{path}/{name}"
            merged[name] = merge(
                checked(merged[name], inner), checked(value, inner), inner
            )
        elif name == "enum":
            merged[name] = [each for each in merged[name] if is_among(each, value)]
        elif name == "const":
            return False
        elif name == "uniqueItems":
            merged[name] = True
        else:
            raise fail(
                path, f"two schemas with {name} hold together; write them as one"
            )
    # What one schema forbids beside its properties is forbidden to the other as well.
    closed = [
        each for each in (one, other) if each.get("additionalProperties") is False
    ]
    for schema in closed:
        known = {*(schema.get("properties") or ())}
        extra = [key for key in merged.get("properties") or () if key not in known]
        if extra and not schema.get("patternProperties"):
            merged["properties"] = {
                key: False if key in extra else value
                for key, value in merged["properties"].items()
            }
    return merged


def apart(one: Schema, other: Schema, path: str) -> bool:
    """Whether it is certain that what is written for one is not valid under the other.

    Args:
        one, other: without references at the top.
    """
    if isinstance(one, bool) or isinstance(other, bool):
        return one is False or other is False
    values = [_values(one), _values(other)]
    if values[0] is not None and values[1] is not None:
        return not any(is_among(each, values[1]) for each in values[0])
    return _never_both(one, other, path) and _never_both(other, one, path)


def _never_both(one: Mapping[str, Any], other: Mapping[str, Any], path: str) -> bool:
    """Whether no value that is written for `one` is valid under `other`."""
    written, valid = written_types(one, path), types_of(other, path)
    values = _values(one), _values(other)
    if values[0] is not None:
        return valid is not None and not any(has_type(v, valid) for v in values[0])
    if values[1] is not None:
        return written is not None and not any(has_type(v, written) for v in values[1])
    if written is None:
        return False
    common = written if valid is None else common_types(written, valid)
    if not common:
        return True
    return common == ["object"] and (_keys_apart(one, other) or _keys_apart(other, one))


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema.get("enum")


def _keys_apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a key that objects of `one` must have is impossible in `other`."""
    theirs = other.get("properties") or {}
    for key in one.get("required") or ():
        closed = other.get("additionalProperties") is False
        if closed and key not in theirs and not other.get("patternProperties"):
            return True
        mine = (one.get("properties") or {}).get(key)
        if not isinstance(mine, Mapping) or not isinstance(theirs.get(key), Mapping):
            continue
        values = _values(mine), _values(theirs[key])
        if values[0] is None or values[1] is None:
            continue
        # The other object may leave the key out, but these here have it.
        if not any(is_among(each, values[1]) for each in values[0]):
            return True
    return False
