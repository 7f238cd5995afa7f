# SPDX-License-Identifier: Apache-2.0
"""Structured output and tools through a real server: every text matches, or is a 400.

The model has random weights and the 256 bytes for tokens. What it says is nonsense, so
that what is right about its answers comes from the constraint alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from byte_model import write_byte_model
from server.launch import REPLY_SECONDS, SIZES, VLLM, Server, running_server

# A server of its own takes long to start. What `llada-tiny` can spell is tested on the
# shared one, in `test_patterns.py`.
pytestmark = pytest.mark.slow

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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = write_byte_model(tmp_path_factory.mktemp("model") / "LLaDA-bytes")
    command = [
        *(VLLM, "serve", str(folder), "--dlm-strategy", "threshold", *SIZES),
        *("--dlm-block-length", "32"),
        # Pages for a few texts, which take more of them with each canvas.
        *("--max-model-len", "512", "--dlm-max-canvas", "64"),
        *("--num-gpu-blocks-override", "20"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ]
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(command, log, model=str(folder)) as running:
        yield running


def text_of_stream(chunks: Any) -> str:
    parts = []
    for chunk in chunks:
        for choice in chunk.choices:
            is_chat = hasattr(choice, "delta")
            parts.append((choice.delta.content if is_chat else choice.text) or "")
    return "".join(parts)


def said(error: Any) -> str:
    return error.value.body["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_chat_answers_with_what_the_schema_says(
    server: Server, stream: bool, temperature: int
):
    reply = server.chat(
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
def test_a_completion_matches(server: Server, name: str):
    asked, expected = CONSTRAINTS[name]
    texts = [
        server.text("Go", structured_outputs=asked, max_tokens=64, temperature=warm)
        for warm in (0, 1)
    ]
    texts.append(
        text_of_stream(
            server.complete("Go", structured_outputs=asked, max_tokens=64, stream=True)
        )
    )
    for text in texts:
        assert re.fullmatch(expected, text, re.DOTALL), text
        if "json" in name:
            json.loads(text)


def test_several_at_once_with_ordinary_requests(server: Server):
    """Each gets its own constraint; those without one get the text they get alone."""

    def ask(i: int) -> str:
        kind = i % 3
        if kind == 0:
            return server.text(f"Go {i}", max_tokens=48)
        asked = {"regex": rf"{i}[a-f]{{10,40}}!"} if kind == 1 else {"json": PERSON}
        return server.text(f"Go {i}", max_tokens=96, structured_outputs=asked)

    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(ask, range(12)))
    for i, text in enumerate(texts):
        if i % 3 == 0:
            assert text == ask(i)
        elif i % 3 == 1:
            assert re.fullmatch(rf"{i}[a-f]{{10,40}}!", text)
        else:
            jsonschema.validate(json.loads(text), PERSON)


def test_a_text_that_is_preempted_is_the_same(server: Server):
    """Pages do not suffice for all: some texts begin their blocks anew."""

    def ask(i: int) -> str:
        regex = rf"{i:02}[a-f]{{80}}([g-k]{{4}}|!)+"
        warm = {"temperature": 1, "seed": i} if i % 2 else {}
        text = server.text(
            "Go", max_tokens=120, structured_outputs={"regex": regex}, **warm
        )
        assert re.fullmatch(regex, text)
        return text

    def plain(i: int) -> str:
        return server.text(f"Go {i}", max_tokens=100, ignore_eos=True)

    alone = [ask(i) for i in range(4)], plain(0)
    (before,) = server.metrics("num_preemptions_total")
    with ThreadPoolExecutor(14) as pool:
        others = [pool.submit(plain, 0) for _ in range(2)]
        texts = list(pool.map(ask, range(12)))
        assert (texts[:4], others[0].result()) == alone
        assert others[1].result() == alone[1]
    (after,) = server.metrics("num_preemptions_total")
    assert after > before


def test_a_client_that_leaves_in_the_middle(server: Server):
    """Its pages come back, and whoever asks next is answered as before."""
    asked = {"structured_outputs": {"regex": "[a-f]{400}"}, "max_tokens": 400}
    other = {"structured_outputs": {"regex": "[a-f]{60}"}, "max_tokens": 60}
    expected = server.text("Go", **other)
    with ThreadPoolExecutor(2) as pool:
        stream = server.complete("Go", **asked, stream=True)
        beside = pool.submit(server.text, "Go", **other)
        assert re.fullmatch("[a-f]+", next(iter(stream)).choices[0].text)
        stream.close()
        assert beside.result() == expected
    server.wait_until_idle()
    assert server.text("Go", **other) == expected


def test_a_suffix_is_behind_the_text_that_matches(server: Server):
    asked = {"suffix": "!!", "max_tokens": 12}
    for stream in (False, True):
        reply = server.complete(
            "Go", **asked, structured_outputs={"regex": "[a-f]+-[a-f]+"}, stream=stream
        )
        text = text_of_stream(reply) if stream else reply.choices[0].text
        assert re.fullmatch("[a-f]+-[a-f]+", text) and len(text) == 12
    with pytest.raises(openai.BadRequestError) as error:
        server.complete("Go", **asked, structured_outputs={"regex": "[ab]{3}"})
    assert "at position 3 (a hole) none is left" in said(error)


def calls_of(server: Server, stream: bool, **options: Any) -> list[tuple[str, str]]:
    """Name and arguments of the calls in a chat's answer."""
    reply = server.chat("Go", max_tokens=160, stream=stream, **options)
    if not stream:
        calls = reply.choices[0].message.tool_calls or []
        return [(call.function.name, call.function.arguments) for call in calls]
    parts: dict[int, list[str]] = {}
    for chunk in reply:
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or []:
                part = parts.setdefault(call.index, ["", ""])
                part[0] += call.function.name or ""
                part[1] += call.function.arguments or ""
    return [(name, arguments) for name, arguments in parts.values()]


def check_calls(calls: list[tuple[str, str]]) -> None:
    tools = {each["function"]["name"]: each["function"] for each in (TOOL, OTHER)}
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), tools[name]["parameters"])


@pytest.mark.parametrize("stream", [False, True])
def test_tools(server: Server, stream: bool):
    tools = [TOOL, OTHER]
    calls = calls_of(server, stream, tools=tools, tool_choice="required")
    assert calls
    check_calls(calls)
    named = {"type": "function", "function": {"name": "add"}}
    calls = calls_of(server, stream, tools=tools, tool_choice=named)
    assert [name for name, _ in calls] == ["add"]
    check_calls(calls)
    # One call only, and none unless the model begins one.
    calls = calls_of(
        server, stream, tools=tools, tool_choice="required", parallel_tool_calls=False
    )
    assert len(calls) == 1
    check_calls(calls)
    check_calls(calls_of(server, stream, tools=tools, tool_choice="auto"))


def test_responses_and_messages(server: Server):
    reply = server.client.responses.create(
        model=server.model,
        input="Who?",
        temperature=0,
        max_output_tokens=128,
        text={"format": {"type": "json_schema", "name": "p", "schema": PERSON}},
    )
    jsonschema.validate(json.loads(reply.output_text), PERSON)
    reply = server.client.responses.create(
        model=server.model,
        input="Go",
        temperature=0,
        max_output_tokens=160,
        tools=[{"type": "function", **TOOL["function"]}],
        tool_choice="required",
    )
    (call,) = [each for each in reply.output if each.type == "function_call"][:1]
    check_calls([(call.name, call.arguments)])
    body = {
        "model": server.model,
        "max_tokens": 160,
        "temperature": 0,
        "messages": [{"role": "user", "content": "Go"}],
        "tools": [{"name": "look", "input_schema": ADDRESS}],
        "tool_choice": {"type": "tool", "name": "look"},
    }
    answer = httpx.post(
        f"{server.url}/v1/messages", json=body, timeout=REPLY_SECONDS
    ).json()
    used = [part for part in answer["content"] if part["type"] == "tool_use"]
    # Tools of this route are not strict: a call's arguments are any object.
    assert [(part["name"], type(part["input"])) for part in used] == [("look", dict)]


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


def test_a_refusal_names_the_field_that_was_sent(server: Server):
    wrong = {"name": "a", "schema": {"not": {}}}
    with pytest.raises(openai.BadRequestError) as error:
        server.chat(response_format={"type": "json_schema", "json_schema": wrong})
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
        server.chat(tools=[tool], tool_choice="required")
    assert said(error).startswith("tool_choice: json schema, #/properties/a: contains")


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(server: Server, name: str):
    options, parts = REFUSED[name]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as error:
            server.complete("Go", **{"max_tokens": 64, **options}, stream=stream)
        for part in parts:
            assert part in said(error)


def test_a_template_with_a_schema(server: Server):
    """The pattern covers what is given and the holes; what cannot fit is refused."""
    asked = {"structured_outputs": {"regex": r"[a-z]+: \d{3}!"}}

    def fill(template: str) -> str:
        options = {"vllm_xargs": {"dlm_canvas_text": template}, **asked}
        return server.chat("Go", **options).choices[0].message.content

    assert re.fullmatch(r"[a-z]{4}: \d{3}!", fill("{{4}}: {{3}}!"))
    for template, says in (
        ("{{4}}: {{2}}!", "at position 8 (a given token)"),
        ("ab{{2}}Xy{{3}}", "at position 4 (a given token)"),
        ("ab{{2}}", "fits into the canvas of 4 tokens"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            fill(template)
        assert says in said(error)


def test_a_pattern_that_explodes_keeps_nobody_waiting(server: Server):
    """While it is compiled, and refused, others are answered."""

    def explode(i: int) -> str:
        regex = f"(a|b)*{i}(a|b){{{30 + i}}}(a|b)*b(a|b){{40}}"
        with pytest.raises(openai.BadRequestError) as error:
            server.complete("Go", structured_outputs={"regex": regex})
        return said(error)

    with ThreadPoolExecutor(3) as pool:
        exploding = [pool.submit(explode, i) for i in range(3)]
        while not all(each.done() for each in exploding):
            assert server.text("Go", max_tokens=8) is not None
        for each in exploding:
            assert "too large" in each.result() or "seconds" in each.result()
