# SPDX-License-Identifier: Apache-2.0
"""Constraints that a real server cannot hold: a 400 that says which, and why."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from server.launch import Server
from server.structured_cases import said

pytestmark = pytest.mark.slow

REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "grammar": (
        {"structured_outputs": {"grammar": 'root ::= "(" root ")" | "x"'}},
        ["structured_outputs: grammar: 'root' -> 'root' contains itself", "write out"],
    ),
    "look-ahead": (
        {"structured_outputs": {"regex": "(?=a)b"}},
        ["look-around", "not supported"],
    ),
    "no regular expression": ({"structured_outputs": {"regex": "["}}, ["unterminated"]),
    "explosion": (
        {"structured_outputs": {"regex": "(a|b)*a(a|b){40}"}},
        ["too large", "at most 20000"],
    ),
    "too short": (
        {"structured_outputs": {"regex": "[ab]{32}"}, "max_tokens": 16},
        ["the shortest match has 32 tokens and max_tokens is 16", "at least 32"],
    ),
    "too long": (
        {"structured_outputs": {"regex": "[ab]{3}"}, "min_tokens": 4},
        ["the longest match has 3 tokens", "at most 3"],
    ),
    "a schema's keyword": (
        {"structured_outputs": {"json": {"type": "integer", "multipleOf": 3}}},
        ["structured_outputs: json schema, #: multipleOf"],
    ),
    "recursion": (
        {"structured_outputs": {"json": {"items": {"$ref": "#"}, "type": "array"}}},
        ["contains itself (# -> #)"],
    ),
    "no schema": ({"structured_outputs": {"json": "{"}}, ["no JSON"]),
    "no choice": ({"structured_outputs": {"choice": []}}, ["at least one"]),
    "ignore_eos": (
        {"structured_outputs": {"regex": "a"}, "ignore_eos": True},
        ["ignore_eos", "leave one"],
    ),
    "bad words": (
        {"structured_outputs": {"regex": "a"}, "bad_words": ["b"]},
        ["bad_words", "without these words"],
    ),
    "a strategy": (
        {
            "structured_outputs": {"regex": "a"},
            "vllm_xargs": {"dlm_reference_exact": True},
        },
        ["structured_outputs cannot be combined with reference_exact"],
    ),
}


def test_a_refusal_names_the_field_that_was_sent(byte_server: Server):
    wrong = {"name": "a", "schema": {"not": {}}}
    with pytest.raises(openai.BadRequestError) as error:
        byte_server.chat(response_format={"type": "json_schema", "json_schema": wrong})
    assert said(error).startswith("response_format: json schema, #: not is not")
    tool = {
        "type": "function",
        "function": {
            "name": "f",
            "strict": True,
            "parameters": {"type": "object", "properties": {"a": {"contains": {}}}},
        },
    }
    with pytest.raises(openai.BadRequestError) as error:
        byte_server.chat(tools=[tool], tool_choice="required")
    assert said(error).startswith("tool_choice: json schema, #/properties/a: contains")


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(byte_server: Server, name: str):
    options, parts = REFUSED[name]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as error:
            byte_server.complete("Go", **{"max_tokens": 64, **options}, stream=stream)
        for part in parts:
            assert part in said(error)


def test_a_pattern_that_explodes_keeps_nobody_waiting(byte_server: Server):
    """While it is compiled, and refused, others are answered."""

    def explode(i: int) -> str:
        regex = f"(a|b)*{i}(a|b){{{30 + i}}}(a|b)*b(a|b){{40}}"
        with pytest.raises(openai.BadRequestError) as error:
            byte_server.complete("Go", structured_outputs={"regex": regex})
        return said(error)

    with ThreadPoolExecutor(3) as pool:
        exploding = [pool.submit(explode, i) for i in range(3)]
        while not all(each.done() for each in exploding):
            assert byte_server.text("Go", max_tokens=8) is not None
        for each in exploding:
            assert "too large" in each.result() or "seconds" in each.result()
