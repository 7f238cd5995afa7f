# SPDX-License-Identifier: Apache-2.0
"""Texts with holes: what is a hole, what is text, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dlm.admission.canvas_text import Hole, parse
from vllm_dlm.messages import OptionError


def mask(length: int) -> Hole:
    return Hole(length, None, is_mask=True)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("no hole", ["no hole"]),
        ("a{{12}}b", ["a", Hole(12, None), "b"]),
        ("{{city:4}}{{1}}", [Hole(4, "city"), Hole(1, None)]),
        ("x<|mask|><|mask|>y<|mask|>", ["x", mask(2), "y", mask(1)]),
        ("{{2}}<|mask|>{{3}}", [Hole(2, None), mask(1), Hole(3, None)]),
        (r"a\{{1}}", ["a{{1}}"]),
        (r"\<|mask|>", ["<|mask|>"]),
        (r"a\\{{1}}", ["a\\", Hole(1, None)]),
        (r"\\\{{1}}", ["\\{{1}}"]),
        (r"C:\new }} {x}", [r"C:\new }} {x}"]),
        (r"\{{{{2}}", ["{{", Hole(2, None)]),
    ],
)
def test_parts(text: str, parts: list[str | Hole]):
    assert parse(text, "canvas_text") == parts


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{{", "no }} behind"),
        ("a {{12", "no }} behind"),
        ("{{}}", "is no hole"),
        ("{{city}}", "is no hole"),
        ("{{-1}}", "is no hole"),
        ("{{ 4 }}", "is no hole"),
        ("{{1.5}}", "is no hole"),
        ("{{4:city}}", "is no hole"),
        ("{{0}}", "a hole of 0 tokens"),
        ("{{9999999}}", "a hole of 9999999 tokens"),
        ("{{a:1}}{{a:2}}", "two holes are named 'a'"),
    ],
)
def test_refused(text: str, told: str):
    with pytest.raises(OptionError, match="canvas_text") as caught:
        parse(text, "canvas_text")
    assert told in str(caught.value)


@given(st.text(st.sampled_from("\\{}<|mask>a"), max_size=30))
def test_any_text_can_be_escaped(text: str):
    """A backslash before each marker, and one more for each that stands there."""
    escaped, at = "", 0
    while at < len(text):
        end = at
        while end < len(text) and text[end] == "\\":
            end += 1
        marker = next((m for m in ("{{", "<|mask|>") if text.startswith(m, end)), "")
        slashes = text[at:end]
        escaped += slashes * 2 + "\\" + marker if marker else slashes
        if not marker and end < len(text):
            escaped += text[end]
            end += 1
        at = end + len(marker)
    assert parse(escaped, "canvas_text") == ([text] if text else [])
