# SPDX-License-Identifier: Apache-2.0
"""Frames in streams: beside the answer's own chunks, which stay as they are."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from server.launch import REPLY_SECONDS, Server
from tiers import fast

ASKS = {"dlm_frames": "text"}
ROUTES = ("/v1/completions", "/v1/chat/completions")
QUESTION = "Reverse [Ada, Ben, Carl]"


def body_of(server: Server, route: str, **options: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"prompt": QUESTION}
    if "chat" in route:
        asked = {"messages": [{"role": "user", "content": QUESTION}]}
    asked |= {"model": server.model, "stream": True, "temperature": 0}
    return asked | {"max_tokens": 40, "return_token_ids": True, **options}


def events_of(server: Server, route: str, **options: Any) -> list[str]:
    """The lines of a stream's events."""
    reply = httpx.post(
        server.url + route,
        json=body_of(server, route, **options),
        timeout=REPLY_SECONDS,
    )
    assert reply.status_code == 200, reply.text
    return [line for line in reply.text.split("\n\n") if line]


def taken_apart(events: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """An answer's own events, and frames."""
    own, frames = [], []
    for event in events:
        if '"type":"diffusion_frame"' in event:
            frames.append(json.loads(event.removeprefix("data: ")))
        else:
            own.append(event)
    return own, frames


def canvas_of(frames: Sequence[dict[str, Any]], choice: int = 0) -> dict[int, int]:
    """Position -> token, as the frames of a choice leave it."""
    canvas: dict[int, int] = {}
    for frame in frames:
        if frame["choices"][0]["index"] != choice:
            continue
        for position, token, *_ in frame["dlm"]["writes"]:
            canvas[position] = token
    return canvas


def ids_of(own: Sequence[str], choice: int = 0) -> list[int]:
    """Token ids of a choice's chunks."""
    ids: list[int] = []
    for event in own[:-1]:
        for one in json.loads(event.removeprefix("data: "))["choices"]:
            if one["index"] == choice:
                ids += one.get("token_ids") or []
    return ids


def anonymous(events: Sequence[str]) -> list[str]:
    """Events without the answer's name and time."""
    pattern = r'"(id|created)":("[^"]*"|\d+)'
    return [re.sub(pattern, r'"\1":0', event) for event in events]


@pytest.mark.parametrize("route", ROUTES)
def test_the_answers_own_events_are_the_same(server: Server, route: str):
    options = {"stream_options": {"include_usage": True}, "logprobs": True}
    if "chat" not in route:
        options["logprobs"] = 1
    plain = events_of(server, route, **options)
    assert taken_apart(plain)[1] == []
    own, frames = taken_apart(
        events_of(server, route, **options, vllm_xargs=ASKS | {"dlm_frames": "writes"})
    )
    assert anonymous(own) == anonymous(plain)
    assert own[-1] == "data: [DONE]"
    assert frames
    assert all("text" not in frame for frame in frames)


@pytest.mark.parametrize("route", ROUTES)
def test_frames_come_before_their_tokens(server: Server, route: str):
    xargs = ASKS | {"dlm_strategy": "static", "dlm_block_length": 8}
    events = events_of(server, route, vllm_xargs=xargs, ignore_eos=True)
    own, frames = taken_apart(events)
    ids = ids_of(own)
    canvas = canvas_of(frames)
    assert [canvas[i] for i in range(len(ids))] == ids
    assert [frame["dlm"]["forward"] for frame in frames] == [*range(40)]
    assert {frame["block"] for frame in frames} == {*range(5)}
    assert {frame["total"] for frame in frames} == {8}
    handed_out = 0
    written: set[int] = set()
    for event in events[:-1]:
        chunk = json.loads(event.removeprefix("data: "))
        if chunk.get("type") == "diffusion_frame":
            assert chunk["dlm"]["final"] == handed_out
            written |= {write[0] for write in chunk["dlm"]["writes"]}
            masked = [at for at in range(*_block(chunk)) if at not in written]
            assert chunk["dlm"]["masked"] == masked
            assert chunk["text"].count("\N{MEDIUM SHADE}") == len(masked)
            assert chunk["id"] == json.loads(own[0].removeprefix("data: "))["id"]
        else:
            handed_out += sum(
                len(one.get("token_ids") or []) for one in chunk["choices"]
            )
            assert handed_out <= len(written)


def _block(frame: dict[str, Any]) -> tuple[int, int]:
    return frame["dlm"]["start"], frame["dlm"]["end"]


WAYS: list[dict[str, Any]] = [
    {"dlm_strategy": "saber"},
    {"dlm_strategy": "freedave"},
    {"dlm_eotp": "token", "dlm_eotp_threshold": 0.5},
    {"dlm_strategy": "klass", "dlm_cache": "dual"},
]


@pytest.mark.parametrize("xargs", fast(WAYS[1], WAYS[2], of=WAYS))
def test_several_choices_of_several_prompts(server: Server, xargs: dict[str, Any]):
    options = {"n": 2, "temperature": 1, "seed": 3, "prompt": [QUESTION, "Copy [Ben]"]}
    own, frames = taken_apart(
        events_of(server, ROUTES[0], vllm_xargs=ASKS | xargs, **options)
    )
    for choice in range(4):
        canvas, ids = canvas_of(frames, choice), ids_of(own, choice)
        assert ids
        assert [canvas[i] for i in range(len(ids))] == ids


def test_the_openai_client_reads_both(server: Server):
    options = {"max_tokens": 40, "vllm_xargs": ASKS, "stream": True}
    expected = server.chat(QUESTION, max_tokens=40).choices[0].message.content
    text, frames = "", 0
    for chunk in server.chat(QUESTION, **options):
        frames += getattr(chunk, "type", None) == "diffusion_frame"
        text += chunk.choices[0].delta.content or ""
    assert text == expected
    assert frames
    text = "".join(
        chunk.choices[0].text for chunk in server.complete(QUESTION, **options)
    )
    assert text == server.text(QUESTION, max_tokens=40)
    # What gathers chunks into an answer.
    with server.client.chat.completions.stream(
        model=server.model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=40,
        temperature=0,
        extra_body={"vllm_xargs": ASKS},
    ) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.content == expected


def test_who_stops_reading_stops_nobody(server: Server):
    """It holds an answer of a thousand frames and reads none; then it goes."""
    parts = urlsplit(server.url)
    many = body_of(
        server,
        ROUTES[0],
        prompt=[QUESTION] * 4,
        max_tokens=250,
        ignore_eos=True,
        vllm_xargs=ASKS | {"dlm_strategy": "static"},
    )
    data = json.dumps(many).encode()
    head = (
        f"POST {ROUTES[0]} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect((parts.hostname, parts.port))
        lazy.sendall(head.encode() + data)
        assert lazy.recv(12) == b"HTTP/1.1 200"
        with ThreadPoolExecutor() as pool:
            texts = pool.map(lambda _: server.text(QUESTION, max_tokens=40), range(4))
            assert len({*texts}) == 1
    server.wait_until_idle()


@pytest.mark.parametrize("route", ROUTES)
def test_not_without_a_stream(server: Server, route: str):
    with pytest.raises(openai.BadRequestError, match="dlm_step_map") as refused:
        (server.chat if "chat" in route else server.complete)(
            max_tokens=4, vllm_xargs=ASKS
        )
    assert "dlm_frames: frames come with streams" in str(refused.value)


def test_other_routes_have_none(server: Server):
    for path, body in {
        "/v1/responses": {"input": QUESTION, "max_output_tokens": 8},
        "/v1/messages": {
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": 8,
        },
        "/inference/v1/generate": {"token_ids": [5, 6]},
    }.items():
        asked = {"model": server.model, "stream": True, **body}
        if "generate" in path:
            asked["sampling_params"] = {"max_tokens": 4, "extra_args": ASKS}
        else:
            asked["vllm_xargs"] = ASKS
        reply = httpx.post(server.url + path, json=asked, timeout=REPLY_SECONDS)
        assert reply.status_code == 400, (path, reply.text)
        assert "frames" in reply.text, path


@pytest.mark.parametrize("value", [True, "all", 3])
def test_a_wrong_value(server: Server, value: Any):
    with pytest.raises(openai.BadRequestError, match="writes"):
        server.complete(max_tokens=4, stream=True, vllm_xargs={"dlm_frames": value})


def test_nobody_can_watch_another(server: Server):
    with pytest.raises(openai.BadRequestError, match="dlm_watched"):
        server.complete(max_tokens=4, stream=True, vllm_xargs={"dlm_watched": 1})
