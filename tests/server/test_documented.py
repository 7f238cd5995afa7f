# SPDX-License-Identifier: Apache-2.0
"""Requests that pages show are answered: by llada-tiny, whatever model they name."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from documented import commands
from server.launch import MODEL, REPLY_SECONDS, Server

OF_ANOTHER_SERVER = ("pair", "dreamon")
"""Models whose server has other options; tests/switching and test_elastic.py ask it."""


def shown_requests(*models: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Page, path and body of every request that is shown as a curl command: of these
    models, or without any, of all that llada-tiny can stand for.

    Where the page starts a server before, its strategy goes into the request.
    """
    found, served = [], {}
    for page, words in commands():
        pairs = dict(pairwise(words))
        if words[:2] == ("vllm", "serve"):
            served[page] = pairs.get("--dlm-strategy")
        if words[0] != "curl" or not pairs.get("-d", "").startswith("{"):
            continue
        body = json.loads(pairs["-d"])
        # What names no model asks for no text: test_vllm_features.py.
        model = body.get("model")
        if model not in models if models else model in (None, *OF_ANOTHER_SERVER):
            continue
        if strategy := served.get(page):
            own = body.get("vllm_xargs", {})
            body["vllm_xargs"] = {"dlm_strategy": strategy} | own
        url = words[1] if "://" in words[1] else f"http://{words[1]}"
        found.append((page, urlsplit(url).path, body))
    return found


@pytest.mark.parametrize(("page", "path", "body"), shown_requests())
def test_it_is_answered(server: Server, page: str, path: str, body: dict[str, Any]):
    request = body | {"model": MODEL}
    reply = httpx.post(f"{server.url}{path}", json=request, timeout=REPLY_SECONDS)
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    assert choice.get("text") or choice["message"]["content"]
