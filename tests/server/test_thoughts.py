# SPDX-License-Identifier: Apache-2.0
"""A server with a reasoning parser: what has to match begins behind the thought."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import jsonschema
import openai
import pytest
from byte_model import END_OF_THOUGHT, write_thinking_model
from server.launch import REPLY_SECONDS, SIZES, VLLM, Server, running_server

pytestmark = pytest.mark.slow  # a server of its own

SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "age", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = write_thinking_model(tmp_path_factory.mktemp("model") / "LLaDA-thinks")
    command = [
        *(VLLM, "serve", str(folder), "--dlm-strategy", "threshold", *SIZES),
        *("--dlm-block-length", "32", "--max-model-len", "512"),
        *("--reasoning-parser", "deepseek_r1"),
    ]
    with running_server(command, tmp_path_factory.mktemp("log") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", timeout=REPLY_SECONDS
    )


def asked(number: int, **more: object) -> dict[str, object]:
    model = {"model": "", "max_tokens": 64, "seed": number, "temperature": 1.0}
    return {**model, "messages": [{"role": "user", "content": f"Ada {number}"}], **more}


def test_the_answer_matches_behind_a_thought(server: Server, client: openai.OpenAI):
    name = client.models.list().data[0].id
    for number in range(4):
        made = client.chat.completions.create(
            **asked(number, model=name, response_format=FORMAT)
        )
        message = made.choices[0].message
        jsonschema.validate(json.loads(message.content), SCHEMA)
        assert "think>" not in (getattr(message, "reasoning", None) or "")
    regex = {"structured_outputs": {"regex": "[ab]{3}"}}
    stream = client.chat.completions.create(
        **asked(7, model=name, extra_body=regex, stream=True)
    )
    deltas = [chunk.choices[0].delta for chunk in stream if chunk.choices]
    assert re.fullmatch("[ab]{3}", "".join(delta.content or "" for delta in deltas))


def test_a_thought_that_the_prompt_has_ended(client: openai.OpenAI):
    name = client.models.list().data[0].id
    more = {
        "structured_outputs": {"regex": "[ab]{3}"},
        "chat_template_kwargs": {"thinking": False},
        "return_token_ids": True,
    }
    made = client.chat.completions.create(**asked(1, model=name, extra_body=more))
    tokens = made.choices[0].token_ids
    assert END_OF_THOUGHT not in tokens and {*tokens[:3]} <= {*b"ab"}


def test_too_short_for_both(client: openai.OpenAI):
    """The least number counts the token between them."""
    name = client.models.list().data[0].id
    regex = {"structured_outputs": {"regex": "[ab]{3}"}}
    with pytest.raises(openai.BadRequestError, match="has 4 tokens"):
        client.chat.completions.create(
            **asked(1, model=name, max_tokens=3, extra_body=regex)
        )
