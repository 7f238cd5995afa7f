# SPDX-License-Identifier: Apache-2.0
"""Tools through a real server: a call has a name that is there, and its arguments fit.

Also structured output in `/v1/responses` and `/v1/messages`. The model has random
weights: see `test_structured.py`.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import pytest
from server.launch import REPLY_SECONDS, Server
from server.structured_cases import ADDRESS, OTHER, PERSON, TOOL

pytestmark = pytest.mark.slow


def calls_of(
    byte_server: Server, stream: bool, **options: Any
) -> list[tuple[str, str]]:
    """Name and arguments of the calls in a chat's answer."""
    reply = byte_server.chat("Go", max_tokens=160, stream=stream, **options)
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
def test_tools(byte_server: Server, stream: bool):
    tools = [TOOL, OTHER]
    calls = calls_of(byte_server, stream, tools=tools, tool_choice="required")
    assert calls
    check_calls(calls)
    named = {"type": "function", "function": {"name": "add"}}
    calls = calls_of(byte_server, stream, tools=tools, tool_choice=named)
    assert [name for name, _ in calls] == ["add"]
    check_calls(calls)
    # One call only, and none unless the model begins one.
    calls = calls_of(
        byte_server,
        stream,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
    )
    assert len(calls) == 1
    check_calls(calls)
    check_calls(calls_of(byte_server, stream, tools=tools, tool_choice="auto"))


def test_responses_and_messages(byte_server: Server):
    reply = byte_server.client.responses.create(
        model=byte_server.model,
        input="Who?",
        temperature=0,
        max_output_tokens=128,
        text={"format": {"type": "json_schema", "name": "p", "schema": PERSON}},
    )
    jsonschema.validate(json.loads(reply.output_text), PERSON)
    reply = byte_server.client.responses.create(
        model=byte_server.model,
        input="Go",
        temperature=0,
        max_output_tokens=160,
        tools=[{"type": "function", **TOOL["function"]}],
        tool_choice="required",
    )
    (call,) = [each for each in reply.output if each.type == "function_call"][:1]
    check_calls([(call.name, call.arguments)])
    body = {
        "model": byte_server.model,
        "max_tokens": 160,
        "temperature": 0,
        "messages": [{"role": "user", "content": "Go"}],
        "tools": [{"name": "look", "input_schema": ADDRESS}],
        "tool_choice": {"type": "tool", "name": "look"},
    }
    answer = httpx.post(
        f"{byte_server.url}/v1/messages", json=body, timeout=REPLY_SECONDS
    ).json()
    used = [part for part in answer["content"] if part["type"] == "tool_use"]
    # Tools of this route are not strict: a call's arguments are any object.
    assert [(part["name"], type(part["input"])) for part in used] == [("look", dict)]
