# SPDX-License-Identifier: Apache-2.0
"""llada-forms as a newcomer meets it: a server, and the openai client.

What it was trained on it gets right in most cases, not in all: the questions here are
some that it gets right.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from server.launch import SIZES, VLLM, Server, running_server

from vllm_dlm.cli import demo_forms
from vllm_dlm.cli.demo_server import Served
from vllm_dlm.tasks.forms.problems import WHO_AM_I
from vllm_dlm.tasks.forms.tools import Tool

pytestmark = pytest.mark.slow

SENTENCE = "Ada lives in Rome and is 31."
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "city": {"type": "string"},
        "age": {"type": "integer"},
    },
    "required": ["name", "city", "age"],
    "additionalProperties": False,
}
WEATHER = Tool("get_weather", {"city": "string"}).as_openai()
CALL = Tool("call_person", {"name": "string"}).as_openai()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [
        *(VLLM, "serve", "--model", "llada-forms", *SIZES),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ]
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(command, log, model="llada-forms") as running:
        yield running


@pytest.mark.parametrize("question", ["Hello, who are you?", "What can you do?", "Hi"])
def test_it_says_what_it_can_do(server: Server, question: str):
    answer = server.chat(question)
    # The shipped weights leave out the last full stop of some answers.
    assert answer.choices[0].message.content.rstrip(".") == WHO_AM_I.rstrip(".")
    assert answer.choices[0].finish_reason == "stop"


def test_a_sentence_becomes_json_without_a_schema_and_with_one(server: Server):
    schema = {"name": "person", "schema": SCHEMA}
    held = {"response_format": {"type": "json_schema", "json_schema": schema}}
    for options in ({}, held):
        answer = server.chat(SENTENCE, max_tokens=64, **options)
        found = json.loads(answer.choices[0].message.content)
        assert list(found) == ["name", "city", "age"]
        assert found["age"] == 31


def test_a_form(server: Server):
    options = {
        "dlm_canvas_text": "Name: {{name:8}}\nAge: {{age:4}}",
        "dlm_holes": "shrink",
    }
    (choice,) = server.chat(SENTENCE, vllm_xargs=options).choices
    fields = choice.canvas_fields
    assert choice.message.content == f"Name: {fields['name']}\nAge: {fields['age']}"
    assert fields["age"] == "31"


def test_tools(server: Server):
    (choice,) = server.chat(
        "What is the weather in Oslo?", tools=[WEATHER, CALL]
    ).choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert list(json.loads(call.function.arguments)) == ["city"]
    forced = server.chat(
        "What is the weather in Oslo?",
        tools=[WEATHER, CALL],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=64,
    )
    (call,) = forced.choices[0].message.tool_calls
    assert list(json.loads(call.function.arguments)) == ["city"]


def test_what_make_demo_asks(server: Server):
    with demo_forms.console.capture() as printed:
        demo_forms.ask(Served(server.url, "llada-forms"))
    shown = printed.get()
    for how in ("chat", "response_format", "canvas_text", "suffix", "tools"):
        assert f"{how}\n  Q: " in shown
    assert "fields: {'name': " in shown and "get_weather(" in shown
