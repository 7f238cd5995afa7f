# SPDX-License-Identifier: Apache-2.0
"""Whatever is sent, the answer is one of HTTP's own, and the server goes on.

Every answer is a 2xx, or a 4xx with a message; never a 5xx, never none. Right behind
it the server answers a request as before. What vLLM itself answers with a 500 is listed
by name (`fuzz_known.py`), and each entry is shown to be needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from server.fuzz_bodies import Call, Maker, calls_of
from server.fuzz_known import CORPUS, KNOWN, is_known, named
from server.launch import REPLY_SECONDS, Server

SECONDS = REPLY_SECONDS
"""Longest that an answer may take: a limit against hanging, on shared cores."""

LEFT_OUT = ("/inference/v1/abort_requests", "/scale_elastic_ep")
"""Paths that end the requests of other clients, which is what they are for; and one
that sets the number of engines, where vLLM answers 500 for JSON that is no object."""


TEXT_ROUTES = (
    *("/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch"),
    *("/v1/responses", "/v1/messages", "/inference/v1/generate"),
)
"""Those whose requests reach the engine: asked more often."""


class Target:
    """A server, and what it answers a request of always."""

    def __init__(self, server: Server) -> None:
        self.server = server
        # A connection that is kept may be closed by the server while it is taken up.
        limits = httpx.Limits(max_keepalive_connections=0)
        self.http = httpx.Client(base_url=server.url, timeout=SECONDS, limits=limits)
        self.openapi = self.http.get("/openapi.json").json()
        self.maker = Maker(self.openapi)
        self.calls = [
            call for call in calls_of(self.openapi) if call.path not in LEFT_OUT
        ]
        self.calm = self.probe()

    def probe(self) -> str:
        """The text of a request that is always the same."""
        body = {"model": self.server.model, "prompt": "Copy [Ada, Ben]"}
        body |= {"max_tokens": 16, "temperature": 0}
        reply = self.http.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["text"]

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request, and check its answer."""
        try:
            reply = self.http.request(method, path, **options)
        except httpx.TransportError as error:
            raise AssertionError(f"{method} {path} had no answer: {error!r}") from None
        complaint = fault(reply)
        if complaint and not is_known(path, reply):
            raise AssertionError(f"{method} {path}: {complaint}")
        return reply


def fault(reply: httpx.Response) -> str | None:
    """What is wrong with an answer, if anything is."""
    if reply.status_code >= 500:
        return f"status {reply.status_code}: {reply.text[:500]}"
    has_body = reply.request.method != "HEAD"
    if reply.status_code >= 400 and has_body and not reply.text.strip():
        return f"status {reply.status_code} without a message"
    if reply.headers.get("content-type", "").startswith("text/event-stream"):
        for line in reply.text.splitlines():
            if line.startswith("data: {"):
                error = json.loads(line[6:]).get("error")
                if error and int(error.get("code") or 500) >= 500:
                    return f"an event of error: {line[:500]}"
    return None


@pytest.fixture(scope="module")
def target(server: Server) -> Iterator[Target]:
    target = Target(server)
    yield target
    server.wait_until_idle()
    target.http.close()


@st.composite
def requests(draw: st.DrawFn, target: Target) -> tuple[Call, Any]:
    """A call, and a body for it."""
    with_body = [call for call in target.calls if call.body is not None]
    busy = [call for call in with_body if call.path in TEXT_ROUTES]
    call = draw(st.sampled_from(with_body) | st.sampled_from(busy))
    return call, draw(target.maker.bodies(call.body))


def encoded(body: Any) -> dict[str, Any]:
    """Arguments of `httpx` for a body; in ASCII, as it may hold half characters."""
    return {
        "content": json.dumps(body).encode("ascii"),
        "headers": {"Content-Type": "application/json"},
    }


def run_bodies(target: Target, count: int) -> None:
    @settings(
        max_examples=count,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    @given(st.data())
    def send(data: st.DataObject) -> None:
        call, body = data.draw(requests(target))
        note(f"{call.method} {call.path} {json.dumps(body)}")
        target.send(call.method, call.path, **encoded(body))
        assert target.probe() == target.calm

    send()


@pytest.mark.parametrize(
    ("path", "body"), CORPUS, ids=[named(path, body) for path, body in CORPUS]
)
def test_the_corpus(target: Target, path: str, body: dict[str, Any]):
    target.send("POST", path, **encoded({"model": target.server.model} | body))
    assert target.probe() == target.calm


def test_what_is_known_is_still_so(target: Target):
    """An entry that is no longer needed goes."""
    for known in KNOWN:
        kind = {"Content-Type": "application/json"}
        reply = target.http.post(known.path, content=known.content, headers=kind)
        assert is_known(known.path, reply), reply.text


def test_some_bodies(target: Target):
    run_bodies(target, 40)


@pytest.mark.slow
def test_many_bodies(target: Target):
    run_bodies(target, 3000)


RAW: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "no text": b"\xff\xfe",
    "a number": b"1",
    "null": b"null",
    "deep": b"[" * 100_000,
    "a deep object": b'{"messages":' * 5000,
    "NaN": b'{"model": "llada-tiny", "prompt": "a", "temperature": NaN}',
    "infinite": b'{"model": "llada-tiny", "prompt": "a", "temperature": 1e999}',
    "twice": b'{"model": "llada-tiny", "model": 5, "prompt": "a", "prompt": ["b"]}',
}
DEEP = ("deep", "a deep object")
TYPES = ("application/json", "text/plain", "application/json; charset=utf-16", "")
IDS = ("resp_1", "%00", "a" * 3000, "..%2f..", "%ff")


def test_what_is_no_body(target: Target):
    """On every route that takes one, under several types, and by other methods."""
    for call in target.calls:
        path = call.path.replace("{response_id}", "resp_1")
        for number, (name, content) in enumerate(RAW.items()):
            if name in DEEP and call.path == "/invocations":
                continue  # a known fault, in which the server drops the connection
            kind = TYPES[number % len(TYPES)]
            target.send(
                call.method, path, content=content, headers={"Content-Type": kind}
            )
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
            target.send(method, path)
    assert target.probe() == target.calm


def test_ids_of_no_response(target: Target):
    for name in IDS:
        for query in ("", "?stream=true", "?starting_after=-1", "?stream=x"):
            target.send("GET", f"/v1/responses/{name}{query}")
        target.send("POST", f"/v1/responses/{name}/cancel")
    assert target.probe() == target.calm
