# SPDX-License-Identifier: Apache-2.0
"""Logits that are no numbers, over HTTP: a 500 that says so, counted and logged."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from engine.cases import make_prompt
from engine.test_broken_logits import BAD, damage
from reference.llada import write_random_checkpoint
from server.launch import SIZES, VLLM, Server, running_server

from vllm_dlm.admission.broken_logits import REASON

HEALTHY, DAMAGED = list(make_prompt(9)), [*make_prompt(9), BAD]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("broken")
    model = damage(write_random_checkpoint(folder / "model", seed=2))
    command = [VLLM, "serve", str(model), *SIZES, "--max-model-len", "256"]
    # For tokens in, tokens out.
    command += ["--served-model-name", "damaged-one", "--enable-scale-out"]
    with running_server(command, folder / "log", "damaged-one") as server:
        yield server


def events(server: Server, route: str, body: dict[str, Any]) -> list[str]:
    """What a streamed answer consists of."""
    body = {"model": server.model, "stream": True, "max_tokens": 16} | body
    with httpx.stream("POST", f"{server.url}{route}", json=body, timeout=120) as reply:
        assert reply.status_code == 200
        return [line for line in reply.iter_lines() if line.startswith("data: ")]


@pytest.mark.slow  # A server of its own; engine/ has the same of an engine.
def test_a_request_fails_and_others_do_not(damaged: Server):
    alone = damaged.text(HEALTHY, max_tokens=40)
    with ThreadPoolExecutor(12) as pool:
        failing = [
            pool.submit(damaged.text, DAMAGED, max_tokens=40, temperature=0.5)
            for _ in range(6)
        ]
        healthy = [pool.submit(damaged.text, HEALTHY, max_tokens=40) for _ in range(6)]
        assert {one.result() for one in healthy} == {alone}
        for one in failing:
            with pytest.raises(openai.InternalServerError) as error:
                one.result()
            assert REASON in str(error.value)
    with pytest.raises(openai.InternalServerError, match="logits left no token"):
        damaged.complete(DAMAGED, max_tokens=40, n=3, temperature=0.5)
    damaged.wait_until_idle()
    (before,) = damaged.metrics("dlm:broken_requests_total")
    chat = {"messages": [{"role": "user", "content": f"t3 t{BAD}"}]}
    with pytest.raises(openai.InternalServerError, match="logits left no token"):
        damaged.chat(chat["messages"][0]["content"], max_tokens=16)
    for route, body in (
        ("/v1/completions", {"prompt": DAMAGED}),
        ("/v1/chat/completions", chat),
    ):
        told = events(damaged, route, body)
        assert any('"error"' in event and REASON in event for event in told)
    for prompt, max_tokens, status in ((DAMAGED, 16, 500), (HEALTHY, 2**31, 400)):
        body = {"token_ids": prompt, "sampling_params": {"max_tokens": max_tokens}}
        url = f"{damaged.url}/inference/v1/generate"
        assert httpx.post(url, json=body, timeout=120).status_code == status
    assert damaged.text(HEALTHY, max_tokens=40) == alone
    damaged.wait_until_idle()
    (after,) = damaged.metrics("dlm:broken_requests_total")
    # A chat, two streams, and tokens in, tokens out.
    assert after - before == 4
    assert damaged.log is not None
    text = damaged.log.read_text()
    # One line for all that failed in the same moment: how many is chance.
    assert re.search(r"damaged-one: \d+ requests? ended with an error, for", text)
