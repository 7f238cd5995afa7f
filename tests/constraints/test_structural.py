# SPDX-License-Identifier: Apache-2.0
"""Structural tags as patterns, on texts that should and should not match."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dlm.constraints.automaton import ConstraintError
from vllm_dlm.constraints.structural import structural_pattern, without
from vllm_dlm.constraints.syntax import write

NUMBER = {"type": "json_schema", "json_schema": {"type": "integer"}}
A = {"type": "tag", "begin": "<a>", "content": NUMBER, "end": "</a>"}
B = {"type": "tag", "begin": "<b>", "content": {"type": "any_text"}, "end": "</b>"}


@given(st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_texts_without_words(words: list[str]) -> None:
    rule = re.compile(write(without(words)))
    for length in range(6):
        for letters in product("ab<c", repeat=length):
            text = "".join(letters)
            expected = not any(word in text for word in words)
            assert (rule.fullmatch(text) is not None) == expected, text


def test_a_long_trigger_stays_small() -> None:
    assert len(write(without(["<longcat_tool_call>", "<tool_call>"]))) < 8000


@pytest.mark.parametrize(
    ("form", "taken", "left_out"),
    [
        (A, ["<a>12</a>"], ["<a>x</a>", "12"]),
        (B, ["<b>x<b></b>", "<b></b>"], ["<b></b></b>"]),
        ({**A, "end": ["</a>", "</>"]}, ["<a>1</>", "<a>1</a>"], ["<a>1"]),
        (
            {"type": "json_schema", "json_schema": True},
            ['{"a": [1, "b"]}', "{}"],
            ['"a"', "[]"],
        ),
        ({"type": "const_string", "value": "a.b"}, ["a.b"], ["axb"]),
        ({"type": "regex", "pattern": "a+"}, ["aa"], ["b"]),
        ({"type": "any_text", "excludes": ["x"]}, ["", "abc"], ["axb"]),
        ({"type": "sequence", "elements": [A, A]}, ["<a>1</a><a>2</a>"], ["<a>1</a>"]),
        ({"type": "or", "elements": [A, B]}, ["<a>1</a>", "<b>x</b>"], [""]),
        ({"type": "optional", "content": A}, ["", "<a>1</a>"], ["<a>1</a>" * 2]),
        ({"type": "plus", "content": A}, ["<a>1</a>" * 2], [""]),
        ({"type": "star", "content": A}, ["", "<a>1</a>" * 2], ["x"]),
        (
            {"type": "repeat", "content": A, "min": 1, "max": 2},
            ["<a>1</a>", "<a>1</a>" * 2],
            ["", "<a>1</a>" * 3],
        ),
        (
            {"type": "tags_with_separator", "tags": [A, B], "separator": ", "},
            ["", "<a>1</a>", "<a>1</a>, <b></b>"],
            ["<a>1</a><a>1</a>", "x"],
        ),
        (
            {
                "type": "tags_with_separator",
                "tags": [A],
                "separator": "",
                "at_least_one": True,
                "stop_after_first": True,
            },
            ["<a>1</a>"],
            ["", "<a>1</a><a>1</a>"],
        ),
        (
            {"type": "triggered_tags", "triggers": ["<a"], "tags": [A]},
            ["", "hello", "x <a>1</a> y <a>2</a>", "<b>"],
            ["<a", "x <a>y</a>", "<a>1</a"],
        ),
        (
            {
                "type": "triggered_tags",
                "triggers": ["<"],
                "tags": [A, B],
                "at_least_one": True,
            },
            ["<a>1</a>", "<b></b> x <a>1</a>"],
            ["", "x", "x<a>1</a>", "<a>1</a><"],
        ),
        (
            {
                "type": "triggered_tags",
                "triggers": ["<a>"],
                "tags": [A],
                "stop_after_first": True,
                "excludes": ["!"],
            },
            ["hi", "hi <a>1</a>"],
            ["hi!", "<a>1</a>x"],
        ),
    ],
)
def test_formats(form: dict[str, Any], taken: list[str], left_out: list[str]) -> None:
    rule = re.compile(structural_pattern({"type": "structural_tag", "format": form}))
    for text in taken:
        assert rule.fullmatch(text), text
    for text in left_out:
        assert not rule.fullmatch(text), text


def test_the_older_kind() -> None:
    tag = {
        "type": "structural_tag",
        "structures": [{"begin": "<f>", "schema": {"type": "null"}, "end": "</f>"}],
        "triggers": ["<f"],
    }
    rule = re.compile(structural_pattern(tag))
    assert rule.fullmatch("a <f>null</f>") and not rule.fullmatch("<f>1</f>")


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"type": "grammar", "grammar": "x"}, "'x' stands outside of a rule"),
        ({"type": "token", "token": 3}, "single tokens"),
        ({**A, "begin": {"type": "token", "token": 3}}, "begin or end with a token"),
        ({**NUMBER, "style": "qwen_xml"}, "style 'qwen_xml'"),
        ({**NUMBER, "any_order": True}, "any_order of json_schema"),
        ({"type": "any_text", "max_tokens": 3}, "max_tokens of any_text"),
        ({"type": "any_text", "excludes": ["a" * 300]}, "1 to 256 letters"),
        ({"type": "dispatch", "rules": []}, "'dispatch' is not supported"),
        ({"type": "triggered_tags", "triggers": ["x"], "tags": [A]}, "no trigger"),
        ({"type": "triggered_tags", "triggers": ["x"], "tags": []}, "without tags"),
        (None, "an object with a type"),
    ],
)
def test_refusals(form: Any, says: str) -> None:
    with pytest.raises(ConstraintError, match=says):
        structural_pattern({"format": form})
