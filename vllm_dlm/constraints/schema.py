# SPDX-License-Identifier: Apache-2.0
"""A JSON schema as a pattern: every text that matches is valid under the schema.

The pattern may be narrower than the schema (docs/structured.md says where). A keyword
that it cannot keep is refused by name and place; none is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_dlm.constraints.json_text import (
    ANY_DEPTH,
    BOOLEAN,
    NULL,
    STRING,
    Layout,
    constant,
)
from vllm_dlm.constraints.keywords import (
    ANYTHING,
    DEEPEST,
    KNOWN,
    MOST_COUNTED,
    MOST_SCHEMAS,
    Schema,
    fail,
    has_type,
    same,
    types_of,
    written_types,
)
from vllm_dlm.constraints.limits import ConstraintError
from vllm_dlm.constraints.number_ranges import NOTHING
from vllm_dlm.constraints.schema_merge import (
    apart,
    assertions,
    checked,
    look_up,
    merge,
    refuse_cycle,
)
from vllm_dlm.constraints.schema_parts import (
    counts,
    mapping,
    number_node,
    repeat,
    searches,
    string_node,
)
from vllm_dlm.constraints.syntax import (
    EMPTY,
    Node,
    choice,
    concat,
    optional,
    write,
)


def schema_pattern(
    schema: Any, whitespace: str | None = None, *, closed: bool = False
) -> str:
    """The pattern of a JSON schema.

    Args:
        schema: as JSON has it: an object, or true or false.
        whitespace: a regular expression for what stands inside of brackets and behind
            commas and colons; of what it matches, only JSON's blanks are written. None
            for one optional blank.
        closed: objects have no properties but those that are named, unless the schema
            says more of them.

    Raises:
        ConstraintError: the schema is none, or asks for what is not supported; the
            message names the keyword and where it stands.
    """
    layout = Layout() if whitespace is None else Layout.with_blanks(whitespace)
    return write(schema_node(schema, layout, closed=closed))


def schema_node(schema: Any, layout: Layout, *, closed: bool = False) -> Node:
    """The tree of a JSON schema; see `schema_pattern`."""
    translator = _Translator(checked(schema, "#"), layout, closed)
    node = translator.node(schema, "#")
    if node == NOTHING:
        raise ConstraintError("json schema: no value is valid")
    return node


class _Translator:
    """The tree of a schema; a method for each kind of value."""

    def __init__(self, root: Schema, layout: Layout, closed: bool) -> None:
        self._root, self._layout, self._closed = root, layout, closed
        self._count = 0

    def node(self, schema: Any, path: str) -> Node:
        """The tree of a schema; `NOTHING` where no value is valid.

        Args:
            path: where the schema stands, for messages.
        """
        if path.count("/") > DEEPEST:
            raise fail(path, f"more than {DEEPEST} levels")
        one = self._one(checked(schema, path), path)
        if isinstance(one, bool):
            return self._anything(path) if one else NOTHING
        for name in one:
            if name not in KNOWN:
                raise fail(path, f"{name} is not supported; leave it out")
        for name in ("anyOf", "oneOf"):
            if name in one:
                return self._branches(name, one, path)
        if "const" in one or "enum" in one:
            return self._constants(one, path)
        types = written_types(one, path)
        if types is None:
            return self._anything(path)
        found = [self._typed(kind, one, path) for kind in dict.fromkeys(types)]
        return _either(found)

    def _add(self, count: int, path: str) -> None:
        """Count schemas: references may make very many of a few."""
        self._count += count
        if self._count > MOST_SCHEMAS:
            raise fail(
                path,
                f"more than {MOST_SCHEMAS} schemas inside one another (one that says "
                f"nothing counts {ANYTHING}); name the types of all values",
            )

    def _anything(self, path: str, depth: int = ANY_DEPTH) -> Node:
        self._add(ANYTHING, path)
        return self._layout.anything(depth)

    def _one(self, schema: Schema, path: str) -> Schema:
        """A schema with its references and `allOf` merged into it, without
        annotations."""
        if isinstance(schema, bool):
            return schema
        self._add(1, path)
        one: Schema = assertions(schema)
        assert isinstance(one, dict)
        parts = []
        if "$ref" in one:
            name = one.pop("$ref")
            refuse_cycle(self._root, name, path)
            parts.append((look_up(self._root, name, path), f"{path}/$ref"))
        every = one.pop("allOf", [])
        if not isinstance(every, list):
            raise fail(path, "allOf is a list of schemas")
        parts += [(each, f"{path}/allOf/{i}") for i, each in enumerate(every)]
        for part, place in parts:
            one = merge(one, self._one(checked(part, place), place), place)
        return one

    def _branches(self, name: str, schema: Mapping[str, Any], path: str) -> Node:
        """`anyOf` and `oneOf`: each branch, with the keywords beside it."""
        branches = schema[name]
        if not isinstance(branches, list) or not branches:
            raise fail(path, f"{name} is a list of schemas")
        beside = {key: value for key, value in schema.items() if key != name}
        found, merged = [], []
        for i, branch in enumerate(branches):
            place = f"{path}/{name}/{i}"
            merged.append((self._one(checked(branch, place), place), place))
        if name == "oneOf":
            for i in range(len(merged)):
                for j in range(i):
                    if not apart(merged[j][0], merged[i][0], path):
                        raise fail(
                            path,
                            f"oneOf: a value may be valid under both entry {j} and "
                            f"entry {i}, of which only one may hold; use anyOf",
                        )
        for own, place in merged:
            found.append(self.node(merge(beside, own, place), place))
        return _either(found)

    def _constants(self, schema: Mapping[str, Any], path: str) -> Node:
        """`const` and `enum`: those of the values that have the type."""
        others = [key for key in schema if key not in ("const", "enum", "type")]
        if others:
            raise fail(
                path,
                f"{others[0]} beside const or enum is not supported; list the values "
                "that are valid",
            )
        values = schema.get("enum", [schema.get("const")])
        if not isinstance(values, list):
            raise fail(path, "enum is a list of values")
        if "const" in schema:
            values = [each for each in values if same(each, schema["const"])]
        types = types_of(schema, path)
        return _either([constant(each) for each in values if has_type(each, types)])

    def _typed(self, kind: str, schema: Mapping[str, Any], path: str) -> Node:
        if kind == "boolean":
            return BOOLEAN
        if kind == "null":
            return NULL
        if kind == "string":
            return string_node(schema, path)
        if kind in ("integer", "number"):
            return number_node(schema, path, whole=kind == "integer")
        if kind == "array":
            return self._array(schema, path)
        return self._object(schema, path)

    def _array(self, schema: Mapping[str, Any], path: str) -> Node:
        least, most = counts(schema, "minItems", "maxItems", path)
        prefix, items = schema.get("prefixItems"), schema.get("items", True)
        if isinstance(items, list):
            if prefix is not None:
                raise fail(path, "items is a list beside prefixItems")
            prefix, items = items, schema.get("additionalItems", True)
        elif "additionalItems" in schema:
            raise fail(path, "additionalItems without a list of items says nothing")
        if not isinstance(prefix or [], list):
            raise fail(path, "prefixItems is a list of schemas")
        if schema.get("uniqueItems") and (most is None or most > 1):
            return self._unique(schema, items, prefix, (least, most), path)
        layout = self._layout
        place = f"{path}/items"
        first = [
            self.node(each, f"{path}/prefixItems/{i}")
            for i, each in enumerate(prefix or ())
        ]
        # An entry that cannot be is where the array ends.
        if NOTHING in first:
            most = min(first.index(NOTHING), len(first) if most is None else most)
        entry = NOTHING
        if most is None or most > len(first):
            entry = self.node(items, place)
        if entry == NOTHING:
            most = min(len(first), len(first) if most is None else most)
        if most is not None and least > most:
            return NOTHING
        if not first:
            return layout.array(layout.listed(entry, least, most))
        inside = EMPTY
        if most is None or most > len(first):
            inside = repeat(
                concat([layout.comma, entry]),
                max(least - len(first), 0),
                None if most is None else most - len(first),
            )
        for i in reversed(range(min(len(first), len(first) if most is None else most))):
            part = concat([*([layout.comma] if i else []), first[i], inside])
            inside = part if i < least else optional(part)
        return layout.array(inside)

    def _unique(
        self,
        schema: Mapping[str, Any],
        items: Any,
        prefix: Any,
        bounds: tuple[int, int | None],
        path: str,
    ) -> Node:
        """`uniqueItems`, of entries out of a list of values: in the list's order."""
        one = self._one(checked(items, path), path)
        values = one.get("enum") if isinstance(one, Mapping) else None
        if isinstance(one, Mapping) and one.get("type") == "boolean":
            values = [False, True]
        if values is None or prefix:
            raise fail(
                path,
                "uniqueItems is supported only where items is an enum, or maxItems is "
                "1; leave it out, and check the answer",
            )
        assert isinstance(one, Mapping)
        distinct: list[Any] = []
        for value in values:
            if has_type(value, types_of(one, path)) and not any(
                same(value, each) for each in distinct
            ):
                distinct.append(value)
        entries = [(constant(value), False) for value in distinct]
        least, most = bounds
        return self._layout.array(
            self._chosen(entries, least, most, "minItems and maxItems", path)
        )

    def _chosen(
        self,
        entries: list[tuple[Node, bool]],
        least: int,
        most: int | None,
        names: str,
        path: str,
    ) -> Node:
        required = sum(must for _, must in entries)
        most = len(entries) if most is None else most
        if least > len(entries) or most < required:
            return NOTHING
        counted = least > max(required, 1) or most < len(entries)
        if counted and len(entries) > MOST_COUNTED:
            raise fail(
                path,
                f"{names} are supported for at most {MOST_COUNTED} different entries, "
                f"and here are {len(entries)}; leave them out",
            )
        return self._layout.in_order(entries, least, most)

    def _object(self, schema: Mapping[str, Any], path: str) -> Node:
        least, most = counts(schema, "minProperties", "maxProperties", path)
        properties = mapping(schema, "properties", path)
        by_pattern = mapping(schema, "patternProperties", path)
        others = schema.get("additionalProperties", not self._closed)
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(
            isinstance(key, str) for key in required
        ):
            raise fail(path, "required is a list of names")
        if not properties and not required:
            return self._map(schema, (least, most), path)
        if "propertyNames" in schema:
            raise fail(path, "propertyNames beside properties is not supported")
        for key in properties | dict.fromkeys(required, None):
            for pattern in by_pattern:
                if searches(pattern, key, path):
                    raise fail(
                        path,
                        f"the property {key!r} matches patternProperties {pattern!r} "
                        "as well, which is not supported; merge them",
                    )
        entries = []
        keys = [*properties, *(key for key in required if key not in properties)]
        for key in dict.fromkeys(keys):
            place = f"{path}/properties/{key}"
            value = self.node(properties.get(key, others), place)
            if value == NOTHING:
                if key in required:
                    return NOTHING
                continue
            member = self._layout.member(constant(key), value)
            entries.append((member, key in required))
        return self._layout.object(
            self._chosen(entries, least, most, "minProperties and maxProperties", path)
        )

    def _map(
        self,
        schema: Mapping[str, Any],
        bounds: tuple[int, int | None],
        path: str,
    ) -> Node:
        """An object that may have any keys."""
        least, most = bounds
        if least > 1:
            raise fail(
                path,
                "minProperties is supported for named properties only, or as 1: a key "
                "might be written twice",
            )
        by_pattern = mapping(schema, "patternProperties", path)
        names = schema.get("propertyNames", True)
        others = schema.get("additionalProperties", not self._closed)
        if len(by_pattern) > 1 or (by_pattern and names is not True):
            raise fail(
                path,
                "several patternProperties, or one beside propertyNames, are not "
                "supported: a key might match both",
            )
        place = f"{path}/additionalProperties"
        key: Node = STRING
        for pattern, value in by_pattern.items():
            key = string_node({"pattern": pattern}, f"{path}/patternProperties")
            others, place = value, f"{path}/patternProperties/{pattern}"
        if names is not True:
            key = self._key(names, f"{path}/propertyNames")
        if others is True and "additionalProperties" not in schema and not by_pattern:
            value_node = self._anything(path, 2)
        else:
            value_node = self.node(others, place)
        if NOTHING in (key, value_node):
            return NOTHING if least else self._layout.object(EMPTY)
        member = self._layout.member(key, value_node)
        return self._layout.object(self._layout.listed(member, least, most))

    def _key(self, schema: Any, path: str) -> Node:
        one = self._one(checked(schema, path), path)
        if isinstance(one, bool):
            return STRING if one else NOTHING
        only_strings = merge(one, {"type": "string"}, path)
        return self.node(only_strings, path)


def _either(nodes: list[Node]) -> Node:
    return choice(node for node in nodes if node != NOTHING)
