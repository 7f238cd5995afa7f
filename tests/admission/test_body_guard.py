# SPDX-License-Identifier: Apache-2.0
"""Large bodies are refused at their first wrong entry, and reach vLLM unchanged."""

import argparse
import json
import tracemalloc

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient

from vllm_dlm.admission import body_guard
from vllm_dlm.admission.body_guard import LARGE, MIDDLEWARE, BodyGuard, check_body
from vllm_dlm.messages import OptionError

MANY = 10**5


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setitem(body_guard.process, "ours", True)
    app = FastAPI()

    @app.post("/{path:path}")
    async def count(path: str, request: Request) -> int:
        return len(await request.body())

    app.add_middleware(BodyGuard)
    return TestClient(app)


@pytest.mark.parametrize(
    ("body", "field", "entry"),
    [
        ({"vllm_xargs": {"dlm_a": [[0]] * MANY}}, "vllm_xargs.dlm_a", "entry 0 is [0]"),
        ({"vllm_xargs": {str(n): 1 for n in range(MANY)}}, "vllm_xargs", "at most 256"),
        ({"prompt": [1, -1] * MANY}, "prompt", "entry 1 is -1"),
        ({"prompt": [[1]] * MANY + [["a"]]}, "prompt", "'a'"),
        ({"prompt": ["a"] * MANY + [1]}, "prompt", f"entry {MANY} is 1"),
        ({"token_ids": ["a"] * MANY}, "token_ids", "'a'"),
        ({"stop_token_ids": ["a"] * MANY}, "stop_token_ids", "'a'"),
        ({"stop_sequences": [1] * MANY}, "stop_sequences", "entry 0 is 1"),
        ({"bad_words": [None] * MANY}, "bad_words", "None"),
        ({"logit_bias": {f"x{n}": 1 for n in range(MANY)}}, "logit_bias", "'x0'"),
        ({"logit_bias": {str(n): "a" for n in range(MANY)}}, "logit_bias", "'a'"),
        (
            {"logit_bias": {n: 1 for n in range(300_000)}},
            "logit_bias",
            "at most 262144",
        ),
        ({"stop_token_ids": [1] * 300_000}, "stop_token_ids", "at most 262144"),
        (
            {"sampling_params": {"allowed_token_ids": ["a"] * MANY}},
            "sampling_params.allowed_token_ids",
            "'a'",
        ),
        # Of any size: vLLM reads into it before it knows what it is.
        *(
            ({"structured_outputs": wrong}, "structured_outputs", "expected an object")
            for wrong in ([1], [], "x", 0, 1.5, True, ["a"] * MANY)
        ),
    ],
)
def test_the_first_wrong_entry_is_named(client, body, field, entry):
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["param"], error["code"]) == (field, 400)
    assert error["message"].startswith(field) and entry in error["message"]
    assert len(error["message"]) < 200
    reply = client.post("/v1/messages", json=body)
    assert reply.json()["type"] == "error"


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a" * LARGE},
        {"prompt": [1] * LARGE, "stop": "a", "logit_bias": {"1": 0.5, "-1": 1}},
        {"prompt": [[1], [2]] * LARGE, "vllm_xargs": {"dlm_a": ["a", 1, 0.5, True]}},
        {"prompt": ["a"] * LARGE, "stop_token_ids": None, "bad_words": []},
        {"messages": [1] * LARGE, "vllm_xargs": None},
        [1] * LARGE,
        {"prompt": "structured_outputs", "structured_outputs": {"regex": "a"}},
        {"structured_outputs": None},
        ["structured_outputs"],
    ],
)
def test_what_is_right_or_not_ours_comes_through(client, body):
    text = json.dumps(body)
    assert client.post("/v1/completions", content=text).json() == len(text)
    pieces = (
        text[start : start + 1000].encode() for start in range(0, len(text), 1000)
    )
    assert client.post("/v1/completions", content=pieces).json() == len(text)


@pytest.mark.parametrize("text", ["{" * LARGE, "[" * LARGE, "\xff" * LARGE])
def test_what_is_no_json_is_left_to_vllm(client, text):
    assert client.post("/a", content=text.encode("latin-1")).json() == LARGE


def test_small_bodies_and_other_models_are_not_looked_at(client, monkeypatch):
    wrong = {"stop_token_ids": ["a"]}
    assert client.post("/v1/completions", json=wrong).status_code == 200
    monkeypatch.setitem(body_guard.process, "ours", False)
    wrong = {"stop_token_ids": ["a"] * LARGE}
    assert client.post("/v1/completions", json=wrong).status_code == 200


def test_nothing_is_built_of_the_other_entries():
    text = json.dumps({"stop_token_ids": ["a"] * MANY}).encode()
    tracemalloc.start()
    try:
        json.loads(text)
        parsed = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        with pytest.raises(OptionError):
            check_body(text)
        assert tracemalloc.get_traced_memory()[1] < parsed + 100_000
    finally:
        tracemalloc.stop()


def test_a_servers_arguments_name_it_once():
    from vllm_dlm.patches.flags import from_cli_args

    args = argparse.Namespace(middleware=["own.Middleware"], model="a")
    build = from_cli_args(lambda cls, args: args.middleware)
    for _ in range(2):
        assert build(None, args) == ["own.Middleware", MIDDLEWARE]
