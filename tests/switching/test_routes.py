# SPDX-License-Identifier: Apache-2.0
"""Every route that vLLM has: of a pair it is right, or does not exist."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from server.launch import REPLY_SECONDS, Server, until
from switching.conftest import PROMPT, ask

from vllm_dlm.switching.routes import SERVED, keep_served
from vllm_dlm.switching.server import serve_arguments

pytestmark = pytest.mark.slow

QUESTION = "Copy [Ada, Ben]"
MESSAGES = [{"role": "user", "content": QUESTION}]
FORTY = {"model": "pair", "messages": MESSAGES, "temperature": 0, "max_tokens": 40}
TOOL = {"name": "look", "parameters": {"type": "object", "properties": {}}}


def send(pair: Server, method: str, path: str, **options: Any) -> httpx.Response:
    """A request as it is, and whatever comes back."""
    url = f"{pair.url}{path}"
    return httpx.request(method, url, timeout=REPLY_SECONDS, **options)


def post(pair: Server, path: str, **body: Any) -> Any:
    """The JSON that a body is answered with."""
    reply = send(pair, "POST", path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def events(pair: Server, path: str, **body: Any) -> list[dict[str, Any]]:
    """The JSON of each event of a stream."""
    reply = send(pair, "POST", path, json=body | {"stream": True})
    assert reply.status_code == 200, reply.text
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


def refusal(pair: Server, method: str, path: str, **options: Any) -> str:
    """What a 400 says."""
    reply = send(pair, method, path, **options)
    assert reply.status_code == 400, reply.text
    return reply.text


def values(pair: Server, metric: str, label: str) -> dict[str, float]:
    """A metric's value for each value of a label."""
    lines = send(pair, "GET", "/metrics").text.splitlines()
    found = [line for line in lines if line.startswith(f"{metric}{{")]
    return {
        line.partition(f'{label}="')[2].partition('"')[0]: float(line.split()[-1])
        for line in found
    }


def app_of_vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's application with all routes that an environment variable adds."""
    from vllm import envs
    from vllm.entrypoints.launchers.app import build_app

    # An engine that was started before has vLLM keep what it read.
    envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    return build_app(serve_arguments("model", {}), ("generate",))


def test_every_route_is_right_for_two_or_does_not_exist(pair, monkeypatch):
    app = app_of_vllm(monkeypatch)
    routes = {
        (method, route.path)
        for route in app.routes
        for method in getattr(route, "methods", ["GET"])
    }
    absent = {(method, path) for method, path in routes if path not in SERVED}
    assert absent > {
        ("POST", "/generative_scoring"),
        ("POST", "/collective_rpc"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/inference/v1/generate"),
        ("GET", "/server_info"),
    }
    with httpx.Client(base_url=pair.url, timeout=REPLY_SECONDS) as client:
        for method, path in sorted(absent):
            reply = client.request(method, path.replace("{", "").replace("}", ""))
            # 405: /v1/responses/render would be a response to GET.
            assert reply.status_code in (404, 405), (method, path, reply.text)
        known = client.get("/openapi.json").json()["paths"]
        for path in ("/health", "/ping", "/load", "/version", "/metrics", "/docs"):
            assert client.get(path).status_code == 200, path
    keep_served(app)
    assert {route.path for route in app.routes} >= set(known) >= {"/v1/completions"}


def test_an_application_without_routes_is_no_server():
    from fastapi import FastAPI

    with pytest.raises(RuntimeError, match="does not list its routes"):
        keep_served(FastAPI())


def test_chats_by_other_routes(pair):
    chat = post(pair, "/v1/chat/completions", **FORTY)
    [choice] = chat["choices"]
    assert len(choice["segments"]) > 1
    text = choice["message"]["content"]
    assert post(pair, "/invocations", **FORTY)["choices"] == [choice]

    both = post(
        pair, "/v1/chat/completions/batch", **(FORTY | {"messages": [MESSAGES] * 2})
    )
    assert both["choices"] == [choice, choice | {"index": 1}]

    message = post(pair, "/v1/messages", **FORTY)
    assert message["content"] == [{"type": "text", "text": text}]
    assert message["usage"]["output_tokens"] == 40
    counted = post(pair, "/v1/messages/count_tokens", model="pair", messages=MESSAGES)
    assert counted["input_tokens"] == chat["usage"]["prompt_tokens"]
    pieces = [
        event["delta"]["text"]
        for event in events(pair, "/v1/messages", **FORTY)
        if event["type"] == "content_block_delta"
    ]
    assert len(pieces) > 1 and "".join(pieces) == text


def test_responses(pair):
    asked = {"model": "pair", "input": QUESTION, "temperature": 0}
    asked["max_output_tokens"] = 30
    before = values(pair, "dlm:pair_tokens_total", "model")
    reply = post(pair, "/v1/responses", **asked)
    after = values(pair, "dlm:pair_tokens_total", "model")
    assert all(after[model] > before[model] for model in ("small", "large"))
    text = reply["output"][0]["content"][0]["text"]
    assert reply["usage"]["output_tokens"] == 30
    pieces = [
        event["delta"]
        for event in events(pair, "/v1/responses", **asked)
        if event["type"] == "response.output_text.delta"
    ]
    assert len(pieces) > 1 and "".join(pieces) == text
    assert send(pair, "GET", f"/v1/responses/{reply['id']}").json() == reply


def test_a_response_is_cancelled(pair):
    before = pair.metrics("generation_tokens_total")[0]
    asked = {"model": "pair", "input": QUESTION, "max_output_tokens": 200}
    asked |= {"background": True, "ignore_eos": True}
    reply = post(pair, "/v1/responses", **asked)
    cancelled = post(pair, f"/v1/responses/{reply['id']}/cancel")
    assert cancelled["status"] == "cancelled"
    pair.wait_until_idle()
    assert pair.metrics("generation_tokens_total")[0] - before < 200


@pytest.mark.parametrize("stream", [False, True])
def test_grammars_are_refused_everywhere(pair, stream):
    said = "a grammar begins anew with every turn"
    forced = {"type": "function", "function": {"name": "look"}}
    schema = {"name": "any", "schema": {"type": "object"}}
    chats = (
        {"response_format": {"type": "json_schema", "json_schema": schema}},
        {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"},
        {"tools": [{"type": "function", "function": TOOL}], "tool_choice": forced},
    )
    for options in chats:
        body = FORTY | {"stream": stream} | options
        assert said in refusal(pair, "POST", "/v1/chat/completions", json=body)
    tool = {"name": "look", "input_schema": TOOL["parameters"]}
    body = FORTY | {"stream": stream, "tools": [tool], "tool_choice": {"type": "any"}}
    assert said in refusal(pair, "POST", "/v1/messages", json=body)
    body = {"model": "pair", "input": QUESTION, "stream": stream}
    body["text"] = {"format": {"type": "json_schema", **schema}}
    assert said in refusal(pair, "POST", "/v1/responses", json=body)


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_parser_reads_one_text(pair, stream):
    plain = pair.chat(QUESTION, max_tokens=40).choices[0].message.content
    tools = [{"type": "function", "function": TOOL}]
    reply = pair.chat(QUESTION, max_tokens=40, tools=tools, stream=stream)
    if stream:
        pieces = [chunk.choices[0].delta.content or "" for chunk in reply]
        assert "".join(pieces) == plain
    else:
        assert reply.choices[0].message.content == plain


def test_several_streamed_texts_and_their_usage(pair):
    options = {"temperature": 1, "seed": 5, "n": 3, "max_tokens": 30}
    whole = [choice.message.content for choice in pair.chat(**options).choices]
    streamed, usage = ["", "", ""], []
    counted = {"include_usage": True, "continuous_usage_stats": True}
    for chunk in pair.chat(stream=True, stream_options=counted, **options):
        usage.append(chunk.usage.completion_tokens)
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == whole and len(set(whole)) == 3
    assert 0 < usage[-1] <= 90 and usage[-1] == max(usage)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(pair, stream):
    plain = ask(pair, logprobs=1, max_tokens=20).choices[0]
    reply = ask(pair, logprobs=1, max_tokens=20, echo=True, stream=stream)
    choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
    prompt = post(pair, "/detokenize", model="pair", tokens=PROMPT)["prompt"]
    assert "".join(choice.text for choice in choices) == prompt + plain.text
    logprobs = [each for c in choices for each in c.logprobs.token_logprobs]
    assert logprobs[0] is None
    assert logprobs[len(PROMPT) :] == pytest.approx(
        plain.logprobs.token_logprobs, abs=1e-4
    )


def test_texts_to_tokens_and_back(pair):
    tokens = post(pair, "/tokenize", model="pair", prompt=QUESTION)
    assert tokens["max_model_len"] == 256
    begins, *rest = tokens["tokens"]
    assert begins == 1  # begin of text
    back = post(pair, "/detokenize", model="pair", tokens=rest)
    assert back["prompt"] == QUESTION


def test_both_prefix_caches_are_reset(pair):
    # The small model writes once, the large one goes on: each computes one prompt.
    options = {"prompt": PROMPT * 20, "vllm_xargs": {"ead_tau": 0}}
    found = []
    for reset in (True, False, True):
        if reset:
            assert post(pair, "/reset_prefix_cache") == {"success": True}
        before = values(pair, "vllm:prefix_cache_hits_total", "model_name")
        ask(pair, **options)
        after = values(pair, "vllm:prefix_cache_hits_total", "model_name")
        assert len(after) == 2
        found.append([after[name] > before[name] for name in after])
    assert found == [[False, False], [True, True], [False, False]]


def test_both_engines_sleep(pair):
    state = 'vllm:engine_sleep_state{engine="0"'
    whole = ask(pair, max_tokens=100).choices[0].text
    stream = ask(pair, max_tokens=100, stream=True)
    text = next(iter(stream)).choices[0].text
    # In the middle of a text, which goes on when they wake up.
    assert send(pair, "POST", "/sleep?level=0&mode=keep").status_code == 200
    assert send(pair, "GET", "/is_sleeping").json() == {"is_sleeping": True}
    lines = send(pair, "GET", "/metrics").text.splitlines()
    awake = [line for line in lines if line.startswith(state) and "awake" in line]
    assert [line.split()[-1] for line in awake] == ["0.0", "0.0"]
    assert post(pair, "/wake_up")["status"] == "awake"
    assert send(pair, "GET", "/is_sleeping").json() == {"is_sleeping": False}
    assert text + "".join(chunk.choices[0].text for chunk in stream) == whole


def test_what_two_engines_cannot_do_together(pair):
    assert "sleeps already" in refusal(pair, "POST", "/sleep?mode=wait")
    assert "drops the weights" in refusal(pair, "POST", "/sleep?level=2")
    assert send(pair, "GET", "/is_sleeping").json() == {"is_sleeping": False}
    body = {"model": "pair", "prompt": PROMPT, "max_tokens": 5}
    rank = {"X-data-parallel-rank": "0"}
    completions = ("POST", "/v1/completions")
    assert "a pair has two" in refusal(pair, *completions, json=body, headers=rank)
    transfer = body | {"kv_transfer_params": {"do_remote_decode": True}}
    assert "by two engines" in refusal(pair, *completions, json=transfer)
    assert "ead_tau" in refusal(
        pair, *completions, json=body | {"vllm_xargs": {"ead": 1}}
    )


def test_leaving_without_a_stream_ends_the_work(pair):
    body = {"model": "pair", "prompt": PROMPT, "n": 8, "max_tokens": 240}
    content = json.dumps(body | {"ignore_eos": True})
    address = urlsplit(pair.url)
    before = pair.metrics("generation_tokens_total")[0]
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
            "Content-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        connection.sendall((head + content).encode())
        until(
            lambda: pair.metrics("generation_tokens_total")[0] > before,
            "the request did not begin",
        )
    pair.wait_until_idle()
    assert pair.metrics("generation_tokens_total")[0] - before < 8 * 240
