# SPDX-License-Identifier: Apache-2.0
"""Bodies that every route refuses, with a message of moderate length."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from server.launch import REPLY_SECONDS, Server
from server.test_refusals import JSON_SCHEMA, SCHEMA

QUESTION = [{"role": "user", "content": "Copy [Ada]"}]
ROUTES: dict[str, tuple[dict[str, Any], str]] = {
    # path: (a body, the field that holds options)
    "/v1/completions": ({"prompt": "Copy [Ada]"}, "vllm_xargs"),
    "/v1/chat/completions": ({"messages": QUESTION}, "vllm_xargs"),
    "/v1/chat/completions/batch": ({"messages": [QUESTION] * 2}, "vllm_xargs"),
    "/v1/responses": ({"input": "Copy [Ada]"}, "vllm_xargs"),
    "/v1/messages": ({"messages": QUESTION, "max_tokens": 16}, "vllm_xargs"),
    "/invocations": ({"messages": QUESTION}, "vllm_xargs"),
    "/inference/v1/generate": (
        {"token_ids": [5, 6], "sampling_params": {"temperature": 0}},
        "sampling_params.extra_args",
    ),
}


def post(server: Server, path: str, body: dict[str, Any]) -> httpx.Response:
    body = {"model": server.model, **body}
    return httpx.post(f"{server.url}{path}", json=body, timeout=REPLY_SECONDS)


def said(reply: httpx.Response) -> str:
    """The message of a refusal; no stream has begun."""
    assert reply.status_code == 400, reply.text
    assert reply.headers["content-type"] == "application/json"
    return reply.json()["error"]["message"]


def with_options(carrier: str, body: dict[str, Any], **options: Any) -> dict[str, Any]:
    outer, _, inner = carrier.partition(".")
    if not inner:
        return {**body, outer: options}
    return {**body, outer: {**body[outer], inner: options}}


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_refuses_what_it_would_not_read(server: Server, path: str):
    body, carrier = ROUTES[path]
    # None of our business, and a field of ours: answered.
    # Chats go on to the end of the context: a step for each of the longest blocks.
    few_steps = {"dlm_threshold": 0.001, "dlm_block_length": 256}
    good = with_options(carrier, body, **few_steps) | {"unknown": 1}
    assert post(server, path, good).status_code == 200
    assert "'max_tokens'" in said(post(server, path, {**body, "gen_length": 64}))
    message = said(post(server, path, {**body, "dlm_steps": 4}))
    assert "dlm_steps" in message and f'"{carrier}"' in message
    extra_body = {"extra_body": {"vllm_xargs": {"dlm_steps": 4}}}
    assert "extra_body" in said(post(server, path, body | extra_body))
    message = said(post(server, path, with_options(carrier, body, threshold=0.5)))
    assert "'dlm_threshold'" in message and f"{carrier}.threshold" in message
    for stream in (False, True) if "batch" not in path else (False,):
        wrong = with_options(carrier, body, dlm_threshold=5) | {"stream": stream}
        message = said(post(server, path, wrong))
        assert "dlm_threshold: Input should be less than or equal to 2" in message


SCHEMA_TOOL = {"name": "look", "parameters": SCHEMA}
GRAMMARS: dict[str, tuple[str, dict[str, Any], str]] = {
    "completion": ("/v1/completions", {"response_format": JSON_SCHEMA}, ""),
    "chat": (
        "/v1/chat/completions",
        {
            "tools": [{"type": "function", "function": SCHEMA_TOOL}],
            "tool_choice": {"type": "function", "function": {"name": "look"}},
        },
        "tool_choice",
    ),
    "response": (
        "/v1/responses",
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}},
        "text.format",
    ),
    "message": (
        "/v1/messages",
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        "output_config.format",
    ),
    "generate": (
        "/inference/v1/generate",
        {"sampling_params": {"structured_outputs": {"grammar": "a"}}},
        "sampling_params.structured_outputs",
    ),
}


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_is_refused_by_the_field_that_asks(
    server: Server, name: str, stream: bool
):
    path, asked, field = GRAMMARS[name]
    reply = post(server, path, {**ROUTES[path][0], **asked, "stream": stream})
    assert f"{field or 'response_format'}: " in said(reply)


NUMBERS: list[dict[str, Any]] = [
    {"seed": 2**63},
    {"seed": -(2**63) - 1},
    {"seed": 2**64},
    {"top_k": 2**64, "temperature": 1},
    {"max_tokens": 2**31},
    {"max_tokens": 2**40, "min_tokens": 2**39},
    {"logprobs": 2**31},
    {"stop_token_ids": [128]},
    {"allowed_token_ids": [-1]},
    {"logit_bias": {"5": 1e300}},
    {"logit_bias": {"128": 1}},
    {"n": 2**31, "temperature": 1},
    {"extra_args": {"dlm_steps": 2**64}},
    {"extra_args": {"dlm_eotp_threshold": 1e300}},
]


def test_numbers_that_nothing_holds(server: Server):
    """By the route that checks the least; the engine lives."""
    path = "/inference/v1/generate"
    for params in NUMBERS:
        for stream in (False, True):
            body = {"token_ids": [5], "sampling_params": params, "stream": stream}
            assert said(post(server, path, body)), params
    for token_ids in ([5, 128], [2**31], [2**63]):
        assert said(post(server, path, {"token_ids": token_ids, "sampling_params": {}}))
    assert server.text(max_tokens=8)


MANY = 10**5
HOSTILE: dict[str, bytes] = {
    "a long list": b'{"vllm_xargs": {"dlm_threshold": [%s"x"]}}' % (b'"x",' * MANY),
    "a long list in JSON": b'{"vllm_xargs": {"dlm": "{\\"strategy\\": '
    b'\\"replay\\", \\"strategy_config\\": {\\"recorded_steps\\": '
    b'[%s0.5]}}"}}' % (b"0.5," * MANY),
    "a long text": b'{"vllm_xargs": {"dlm_strategy": "%s"}}' % (b"x" * MANY * 20),
    "a long key": b'{"vllm_xargs": {"dlm_%s": 1}}' % (b"x" * MANY * 20),
    "a long field": b'{"dlm_%s": 1}' % (b"x" * MANY * 20),
    "half a character": b'{"vllm_xargs": {"dlm_strategy": "\\ud800"}}',
    "half a character in a key": b'{"vllm_xargs": {"dlm_\\ud800": 1}}',
    "half a character in a field": b'{"dlm_\\ud800": 1}',
    "a long number": b'{"vllm_xargs": {"dlm_steps": %s}}' % (b"9" * 4000),
    "many ids": b'{"stop_token_ids": [%s200]}' % (b"200," * MANY),
    "many words": b'{"logit_bias": {%s"y": 1}}'
    % b"".join(b'"x%d": 1,' % number for number in range(MANY)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_was_sent_does_not_come_back_at_length(server: Server, name: str):
    start = b'{"model": "%s", "prompt": "a", ' % server.model.encode()
    reply = httpx.post(
        f"{server.url}/v1/completions",
        content=start + HOSTILE[name][1:],
        headers={"Content-Type": "application/json"},
        timeout=REPLY_SECONDS,
    )
    said(reply)
    assert len(reply.content) < 12_000
    assert httpx.get(f"{server.url}/health", timeout=REPLY_SECONDS).status_code == 200
