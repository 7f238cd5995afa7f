# SPDX-License-Identifier: Apache-2.0
"""With `--api-key`, a pair answers without a key only what `keys.OPEN` lists."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from vllm import envs

from vllm_dlm.switching.keys import OPEN, guard, keys_of
from vllm_dlm.switching.routes import SERVED, keep_served
from vllm_dlm.switching.server import serve_arguments

KEY = "secret"
BEARER = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module", autouse=True)
def environment_is_read_again() -> None:
    """An engine that was started before has vLLM keep what it read."""
    envs.disable_envs_cache()


@pytest.fixture(scope="module")
def app(environment_is_read_again: None) -> FastAPI:
    """vLLM's application, as a pair has it, with every route it can have."""
    from vllm.entrypoints.launchers.app import build_app

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_SERVER_DEV_MODE", "1")
        arguments = serve_arguments("model", {"api_key": KEY})
        guard(arguments)
        app = build_app(arguments, ("generate",))
    keep_served(app)
    return app


def test_every_route_that_is_not_open_needs_the_key(app: FastAPI):
    client = TestClient(app, raise_server_exceptions=False)
    routes = [
        (method, path)
        for route in app.routes
        if (path := getattr(route, "path", "")) in SERVED
        for method in getattr(route, "methods", None) or ("GET",)
    ]
    guarded = {path for _, path in routes} - OPEN
    assert guarded >= {"/tokenize", "/detokenize", "/invocations", "/sleep"}
    assert guarded >= {"/v1/completions", "/v1/models", "/reset_prefix_cache"}
    for method, path in routes:
        asked = path.replace("{response_id}", "resp_1")
        status = client.request(method, asked).status_code
        assert (status == 401) == (path in guarded), (method, path, status)
        # What an engine would say does not matter here: there is none.
        status = client.request(method, asked, headers=BEARER).status_code
        assert status != 401, (method, path)


@pytest.mark.parametrize(
    "sent",
    [
        {},
        {"Authorization": KEY},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer other"},
        {"Authorization": f"Basic {KEY}"},
        {"X-Api-Key": KEY},
    ],
)
@pytest.mark.parametrize(
    "path",
    ["/tokenize", "//tokenize", "/tokenize/", "/healthy", "/health/../tokenize", "/x"],
)
def test_wrong_keys_and_other_spellings(app: FastAPI, sent: dict[str, str], path: str):
    client = TestClient(app, raise_server_exceptions=False)
    assert client.post(path, headers=sent).status_code == 401


def test_browsers_may_ask_what_they_may_send(app: FastAPI):
    asked = {"Origin": "http://a", "Access-Control-Request-Method": "POST"}
    reply = TestClient(app).options("/tokenize", headers=asked)
    assert "access-control-allow-methods" in reply.headers


def test_below_a_prefix(app: FastAPI):
    client = TestClient(app, root_path="/api", raise_server_exceptions=False)
    assert client.post("/tokenize").status_code == 401
    assert client.get("/version").status_code == 200


def test_where_keys_come_from(monkeypatch: pytest.MonkeyPatch):
    def keys(**http: Any) -> list[str]:
        return keys_of(serve_arguments("model", http))

    assert keys() == []
    monkeypatch.setenv("VLLM_API_KEY", "environment")
    assert keys() == ["environment"]
    assert keys(api_key=["a", "b"]) == ["a", "b"]
