# SPDX-License-Identifier: Apache-2.0
"""What tests of structured output ask for, and how they read the answers."""

from __future__ import annotations

from typing import Any

ADDRESS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
    },
    "required": ["city", "zip"],
    "additionalProperties": False,
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["friend", "colleague"]},
        "address": ADDRESS,
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True},
    },
    "required": ["name", "age", "address"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": ADDRESS,
        "strict": True,
    },
}
OTHER = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["a"],
        },
        "strict": True,
    },
}


def text_of_stream(chunks: Any) -> str:
    parts = []
    for chunk in chunks:
        for choice in chunk.choices:
            is_chat = hasattr(choice, "delta")
            parts.append((choice.delta.content if is_chat else choice.text) or "")
    return "".join(parts)


def said(error: Any) -> str:
    return error.value.body["message"]
