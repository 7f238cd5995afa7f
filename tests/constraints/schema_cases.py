# SPDX-License-Identifier: Apache-2.0
"""Schemas, with values that match and that do not; and those that are refused."""

from __future__ import annotations

from typing import Any

PERSON = {
    "type": "object",
    "title": "Person",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "married": {"type": "boolean", "default": False},
        "address": {"$ref": "#/$defs/address"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "score": {"type": "number", "exclusiveMinimum": 0},
    },
    "required": ["name", "age", "address"],
    "additionalProperties": False,
    "$defs": {
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string", "maxLength": 40},
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
                "kind": {"enum": ["home", "work"]},
            },
            "required": ["street", "zip"],
        }
    },
}

# (schema, values that match, values that do not); each kept keyword, alone and with
# others. The values in the second list are invalid, or beyond what is written.
KEPT: list[tuple[Any, list[Any], list[Any]]] = [
    (PERSON, [], [{}, {"name": "", "age": 1, "address": {}}]),
    (True, [1, "a", None, {"a": [1]}], []),
    ({}, [[], {}, [1, {"a": None}], -1.5e3], []),
    ({"type": "object"}, [{}, {"a": {"b": [1]}}], [1, []]),
    ({"type": ["string", "null"]}, ["", None], [1]),
    ({"type": ["integer", "number"]}, [1, 1.5, -1e10], ["1"]),
    ({"enum": [1, "a", None, [1, 2], {"a": 1}]}, [1, "a", None, [1, 2]], [2, "b"]),
    ({"enum": ["é\n", '"']}, ["é\n", '"'], ["é"]),
    ({"type": "string", "enum": ["a", 1]}, ["a"], [1]),
    ({"type": "integer", "enum": [1, 2.0, True, 2.5]}, [1], [True, 2.5]),
    ({"const": {"a": [1, 2]}}, [{"a": [1, 2]}], [{"a": [1]}]),
    # Numbers.
    ({"minimum": 3}, [3, 3.5, 10], [2, -3, 2.99]),
    ({"maximum": 3}, [3, -10, 2.5], [3.1, 4]),
    ({"exclusiveMinimum": 0, "exclusiveMaximum": 1}, [0.5, 0.01], [0, 1, 0.0]),
    ({"type": "integer", "minimum": -5, "maximum": 12}, [-5, 0, 12], [-6, 13, 0.5]),
    ({"type": "integer", "exclusiveMinimum": 7}, [8, 100], [7, 6]),
    ({"type": "number", "minimum": -0.5, "maximum": 1.25}, [-0.5, 1.25], [1.26, -1]),
    ({"type": "number", "multipleOf": 1}, [3, -3], [0.5]),
    ({"type": "integer", "format": "int32"}, [2**31 - 1], [2**31]),
    ({"minimum": 5, "exclusiveMinimum": 5}, [5.1], [5]),
    # Strings.
    ({"type": "string"}, ["", 'é"\\\n\t😀 /', "\u2028"], [1]),
    ({"minLength": 2, "maxLength": 3}, ["ab", "é\n", "abc"], ["a", "abcd"]),
    ({"pattern": "^[A-Z]{2}[0-9]+$"}, ["AB1"], ["ab1", "AB"]),
    ({"pattern": '^[^a]"?$'}, ['"', '\n"', "é"], ["a"]),
    ({"type": "string", "pattern": "[a-z]+", "maxLength": 3}, ["abc"], ["abcd", ""]),
    ({"pattern": "^x[ab]*$", "minLength": 2, "maxLength": 3}, ["xa"], ["x", "xaaa"]),
    ({"format": "date"}, ["2026-11-29"], ["2026-02-30", "26-1-1"]),
    ({"format": "date-time"}, ["2026-11-29T10:00:00Z"], ["2026-11-29"]),
    ({"format": "time"}, ["23:59:59+01:00"], ["24:00:00Z"]),
    ({"format": "uuid"}, ["00000000-0000-0000-0000-000000000000"], ["0"]),
    ({"format": "email"}, ["a.b@example.org"], ["a"]),
    ({"format": "ipv4"}, ["127.0.0.1"], ["256.0.0.1"]),
    ({"format": "ipv6"}, ["0:0:0:0:0:0:0:1"], ["1"]),
    ({"format": "hostname"}, ["example.org"], ["-a"]),
    ({"format": "uri", "minLength": 1, "maxLength": 2083}, ["https://a.org/b?c=1"], []),
    ({"format": "duration"}, ["P1D", "PT20M"], ["1D"]),
    # Arrays.
    ({"items": {"type": "integer"}}, [[], [1], [1, 2]], [["a"], [1.5]]),
    ({"type": "array", "minItems": 2, "maxItems": 3}, [[1, 2]], [[1], [1, 2, 3, 4]]),
    ({"type": "array", "maxItems": 0}, [[]], [[1]]),
    (
        {"prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
        [[], [1], [1, "a"]],
        [["a"], [1, "a", 2]],
    ),
    (
        {"prefixItems": [{"const": 1}], "items": {"const": 2}, "minItems": 2},
        [[1, 2], [1, 2, 2]],
        [[1], [2, 2]],
    ),
    (
        {"items": {"enum": ["a", "b", "c"]}, "uniqueItems": True},
        [["a", "c"]],
        [["a"] * 2],
    ),
    (
        {"items": {"enum": [1, 2, 3]}, "uniqueItems": True, "minItems": 2},
        [[1, 2], [1, 3], [1, 2, 3]],
        [[1], [1, 1]],
    ),
    ({"items": False}, [[]], [[1]]),
    ({"uniqueItems": False, "type": "array"}, [[1, 1]], []),
    ({"uniqueItems": True, "maxItems": 1, "items": {"type": "null"}}, [[None]], []),
    # Objects.
    (
        {"properties": {"a": {"type": "integer"}, "b": {"type": "null"}}},
        [{}, {"a": 1}, {"b": None}, {"a": 1, "b": None}],
        [{"a": "x"}, {"c": 1}],
    ),
    (
        {"properties": {"a": True, "b": {"const": 1}, "c": True}, "required": ["b"]},
        [{"b": 1}, {"a": 1, "b": 1}, {"b": 1, "c": 2}],
        [{}, {"a": 1}],
    ),
    ({"properties": {"a": {"const": 1}}, "minProperties": 1}, [{"a": 1}], [{}]),
    (
        {"properties": {k: {"const": 1} for k in "abc"}, "maxProperties": 2},
        [{}, {"a": 1, "c": 1}],
        [{"a": 1, "b": 1, "c": 1}],
    ),
    (
        {"properties": {k: {"const": 1} for k in "abc"}, "minProperties": 2},
        [{"a": 1, "c": 1}, {"b": 1, "c": 1}],
        [{}, {"a": 1}],
    ),
    ({"properties": {"a": False, "b": True}}, [{"b": 1}], [{"a": 1}]),
    ({"required": ["x"], "type": "object"}, [{"x": 1}], [{}]),
    (
        {"required": ["x"], "additionalProperties": {"type": "null"}},
        [{"x": None}],
        [{"x": 1}],
    ),
    (
        {"type": "object", "additionalProperties": {"type": "integer"}},
        [{}, {"a": 1, "b": 2}],
        [{"a": "b"}],
    ),
    ({"type": "object", "additionalProperties": False}, [{}], [{"a": 1}]),
    (
        {"patternProperties": {"^s_[a-z]+$": {"type": "integer"}}},
        [{"s_a": 1}],
        [{"s_a": "x"}, {"t": 1}],
    ),
    (
        {"propertyNames": {"enum": ["a", "b"]}, "minProperties": 1},
        [{"a": 1}],
        [{}, {"c": 1}],
    ),
    # Several schemas.
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, [1, None], ["a"]),
    (
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "anyOf": [{"required": ["a"]}, {"maxProperties": 0}],
        },
        [{"a": 1}, {}],
        [],
    ),
    ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, [1, "a"], [None]),
    (
        {
            "oneOf": [
                {
                    "properties": {"k": {"const": k}, k: {"type": "integer"}},
                    "required": ["k", k],
                }
                for k in ("a", "b")
            ]
        },
        [{"k": "a", "a": 1}],
        [{"k": "a", "b": 1}],
    ),
    (
        {
            "allOf": [
                {"type": "number", "minimum": 2},
                {"maximum": 5},
                {"type": "integer"},
            ]
        },
        [2, 5],
        [1, 6, 2.5],
    ),
    (
        {
            "allOf": [
                {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
                {"properties": {"b": {"type": "string"}}},
            ]
        },
        [{"a": 1}, {"a": 1, "b": "x"}],
        [{}, {"b": "x"}],
    ),
    (
        {
            "$defs": {"a b": {"type": "integer"}, "c": {"$ref": "#/$defs/a b"}},
            "items": {"$ref": "#/$defs/c", "minimum": 3},
        },
        [[3]],
        [[2]],
    ),
    # The same reference twice is no cycle.
    (
        {
            "$defs": {
                "a": {"required": ["k"]},
                "b": {"allOf": [{"$ref": "#/$defs/a"}]},
            },
            "allOf": [
                {"$ref": "#/$defs/a"},
                {"$ref": "#/$defs/b"},
                {"properties": {"k": {"$ref": "#/$defs/a"}}},
            ],
        },
        [{"k": {"k": 1}}],
        [{"k": 1}, {}],
    ),
    ({"definitions": {"n": {"type": "null"}}, "$ref": "#/definitions/n"}, [None], [1]),
    ({"type": "integer", "x-order": 3, "description": "d", "title": "t"}, [1], []),
]


REFUSED: list[tuple[Any, str]] = [
    ({"type": "integer", "multipleOf": 3}, "multipleOf"),
    ({"not": {"type": "null"}}, "not is not supported"),
    ({"if": {}, "then": {}}, "if is not supported"),
    ({"contains": {"const": 1}}, "contains is not supported"),
    ({"dependentRequired": {"a": ["b"]}}, "dependentRequired is not supported"),
    ({"unevaluatedProperties": False}, "unevaluatedProperties is not supported"),
    ({"$dynamicRef": "#a"}, r"\$dynamicRef is not supported"),
    ({"nullable": True, "type": "string"}, "nullable is not supported"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems is supported only where"),
    ({"properties": {"a": {"maxlength": 3}}}, "#/properties/a: maxlength is not"),
    ({"type": "object", "minProperties": 2}, "minProperties is supported for named"),
    ({"type": "strnig"}, "type 'strnig' is none of string, integer"),
    ({"format": "regex", "type": "string"}, "format 'regex' is none of date"),
    ({"pattern": "(?=a)b"}, "pattern: regex: look-around"),
    ({"pattern": "a|bc", "maxLength": 1}, "write the lengths into the pattern"),
    ({"enum": ["a", "bb"], "maxLength": 1}, "maxLength beside const or enum"),
    ({"oneOf": [{"type": "integer"}, {"minimum": 3}]}, "entry 0 and entry 1"),
    ({"oneOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, "use anyOf"),
    ({"$ref": "#/$defs/no"}, "names nothing"),
    ({"$ref": "https://example.org/a.json"}, "not in this document"),
    (
        {
            "$defs": {"n": {"properties": {"next": {"$ref": "#/$defs/n"}}}},
            "$ref": "#/$defs/n",
        },
        r"contains itself \(#/\$defs/n -> #/\$defs/n\)",
    ),
    (
        {
            "$defs": {
                "a": {"items": {"$ref": "#/$defs/b"}},
                "b": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]},
            },
            "$ref": "#/$defs/a",
        },
        r"#/\$defs/a -> #/\$defs/b -> #/\$defs/a",
    ),
    ({"$ref": "#"}, r"\(# -> #\)"),
    (
        {
            "$defs": {
                f"a{i}": {
                    "properties": {
                        "l": {"$ref": f"#/$defs/a{i + 1}"},
                        "r": {"$ref": f"#/$defs/a{i + 1}"},
                    }
                }
                for i in range(20)
            }
            | {"a20": {}},
            "$ref": "#/$defs/a0",
        },
        "more than 2000 schemas",
    ),
    (
        {"properties": {"ab": {}}, "patternProperties": {"^a": {}}},
        "'ab' matches patternProperties",
    ),
    ({"patternProperties": {"^a": {}, "b": {}}}, "several patternProperties"),
    ({"minLength": -1}, "minLength is a number of at least 0"),
    ({"exclusiveMinimum": True, "minimum": 1}, "exclusiveMinimum is a number"),
    ({"minimum": "1"}, "minimum is a number"),
    (3, "a schema is an object, true or false"),
    ({"items": 3}, "#/items: a schema is an object"),
    (False, "no value is valid"),
    ({"minimum": 5, "maximum": 4, "type": "integer"}, "no value is valid"),
    ({"properties": {"a": False}, "required": ["a"]}, "no value is valid"),
    ({"required": ["a"], "additionalProperties": False}, "no value is valid"),
    ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "pattern hold together"),
    ({"allOf": [{"type": "string"}, {"type": "null"}]}, "no value is valid|type is"),
]
