# SPDX-License-Identifier: Apache-2.0
"""Structured output through a real server: every text matches.

The model has random weights and the 256 bytes for tokens. What it says is nonsense, so
that what is right about its answers comes from the constraint alone.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import openai
import pytest
from server.launch import Server
from server.structured_cases import ADDRESS, FORMAT, PERSON, said, text_of_stream

# A server of its own takes long to start. What `llada-tiny` can spell is tested on the
# shared one, in `test_patterns.py`.
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_chat_answers_with_what_the_schema_says(
    byte_server: Server, stream: bool, temperature: int
):
    reply = byte_server.chat(
        "Who?",
        response_format=FORMAT,
        max_tokens=128,
        temperature=temperature,
        stream=stream,
        seed=1,
    )
    text = text_of_stream(reply) if stream else reply.choices[0].message.content
    jsonschema.validate(json.loads(text), PERSON)


CONSTRAINTS: dict[str, tuple[dict[str, Any], str]] = {
    "regex": ({"regex": r"[A-Z][a-z]{2,5} \d{1,3}"}, r"[A-Z][a-z]{2,5} \d{1,3}"),
    "choice": ({"choice": ["yes", "no", "it depends"]}, "yes|no|it depends"),
    "json": ({"json": ADDRESS}, r'\{ ?"city":.*\}'),
    "compact json": (
        {"json": ADDRESS, "disable_any_whitespace": True},
        r'\{"city":"[^"]*","zip":"\d{5}"\}|\{"city":"(?:[^"\\]|\\.)*","zip":"\d{5}"\}',
    ),
    "json object": ({"json_object": True}, r"\{.*\}"),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_completion_matches(byte_server: Server, name: str):
    asked, expected = CONSTRAINTS[name]
    texts = [
        byte_server.text(
            "Go", structured_outputs=asked, max_tokens=64, temperature=warm
        )
        for warm in (0, 1)
    ]
    texts.append(
        text_of_stream(
            byte_server.complete(
                "Go", structured_outputs=asked, max_tokens=64, stream=True
            )
        )
    )
    for text in texts:
        assert re.fullmatch(expected, text, re.DOTALL), text
        if "json" in name:
            json.loads(text)


def test_several_at_once_with_ordinary_requests(byte_server: Server):
    """Each gets its own constraint; those without one get the text they get alone."""

    def ask(i: int) -> str:
        kind = i % 3
        if kind == 0:
            return byte_server.text(f"Go {i}", max_tokens=48)
        asked = {"regex": rf"{i}[a-f]{{10,40}}!"} if kind == 1 else {"json": PERSON}
        return byte_server.text(f"Go {i}", max_tokens=96, structured_outputs=asked)

    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(ask, range(12)))
    for i, text in enumerate(texts):
        if i % 3 == 0:
            assert text == ask(i)
        elif i % 3 == 1:
            assert re.fullmatch(rf"{i}[a-f]{{10,40}}!", text)
        else:
            jsonschema.validate(json.loads(text), PERSON)


def test_a_text_that_is_preempted_is_the_same(byte_server: Server):
    """Pages do not suffice for all: some texts begin their blocks anew."""

    def ask(i: int) -> str:
        regex = rf"{i:02}[a-f]{{80}}([g-k]{{4}}|!)+"
        warm = {"temperature": 1, "seed": i} if i % 2 else {}
        text = byte_server.text(
            "Go", max_tokens=120, structured_outputs={"regex": regex}, **warm
        )
        assert re.fullmatch(regex, text)
        return text

    def plain(i: int) -> str:
        return byte_server.text(f"Go {i}", max_tokens=100, ignore_eos=True)

    alone = [ask(i) for i in range(4)], plain(0)
    (before,) = byte_server.metrics("num_preemptions_total")
    with ThreadPoolExecutor(14) as pool:
        others = [pool.submit(plain, 0) for _ in range(2)]
        texts = list(pool.map(ask, range(12)))
        assert (texts[:4], others[0].result()) == alone
        assert others[1].result() == alone[1]
    (after,) = byte_server.metrics("num_preemptions_total")
    assert after > before


def test_a_client_that_leaves_in_the_middle(byte_server: Server):
    """Its pages come back, and whoever asks next is answered as before."""
    asked = {"structured_outputs": {"regex": "[a-f]{400}"}, "max_tokens": 400}
    other = {"structured_outputs": {"regex": "[a-f]{60}"}, "max_tokens": 60}
    expected = byte_server.text("Go", **other)
    with ThreadPoolExecutor(2) as pool:
        stream = byte_server.complete("Go", **asked, stream=True)
        beside = pool.submit(byte_server.text, "Go", **other)
        assert re.fullmatch("[a-f]+", next(iter(stream)).choices[0].text)
        stream.close()
        assert beside.result() == expected
    byte_server.wait_until_idle()
    assert byte_server.text("Go", **other) == expected


def test_a_suffix_is_behind_the_text_that_matches(byte_server: Server):
    asked = {"suffix": "!!", "max_tokens": 12}
    for stream in (False, True):
        reply = byte_server.complete(
            "Go", **asked, structured_outputs={"regex": "[a-f]+-[a-f]+"}, stream=stream
        )
        text = text_of_stream(reply) if stream else reply.choices[0].text
        assert re.fullmatch("[a-f]+-[a-f]+", text) and len(text) == 12
    with pytest.raises(openai.BadRequestError) as error:
        byte_server.complete("Go", **asked, structured_outputs={"regex": "[ab]{3}"})
    assert "at position 3 (a hole) none is left" in said(error)


def test_a_template_with_a_schema(byte_server: Server):
    """The pattern covers what is given and the holes; what cannot fit is refused."""
    asked = {"structured_outputs": {"regex": r"[a-z]+: \d{3}!"}}

    def fill(template: str) -> str:
        options = {"vllm_xargs": {"dlm_canvas_text": template}, **asked}
        return byte_server.chat("Go", **options).choices[0].message.content

    assert re.fullmatch(r"[a-z]{4}: \d{3}!", fill("{{4}}: {{3}}!"))
    for template, says in (
        ("{{4}}: {{2}}!", "at position 8 (a given token)"),
        ("ab{{2}}Xy{{3}}", "at position 4 (a given token)"),
        ("ab{{2}}", "fits into the canvas of 4 tokens"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            fill(template)
        assert says in said(error)
