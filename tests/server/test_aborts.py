# SPDX-License-Identifier: Apache-2.0
"""Clients that leave: their requests end, and nothing of them stays behind."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from server.launch import MODEL, REPLY_SECONDS, Server, split_options, until
from tiers import fast
from tokenizers import Tokenizer

# Nearly the whole context, one token a step: seconds, if nobody ends it.
ENDLESS: dict[str, Any] = {
    "prompt": "Copy [Ada, Ben]",
    "max_tokens": 960,
    "ignore_eos": True,
    "vllm_xargs": {"dlm_strategy": "static"},
}
CLIENT = """\
import sys, openai
client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
for chunk in client.completions.create(
    model=sys.argv[2], prompt="Copy [Ada, Ben]", max_tokens=960, temperature=0,
    stream=True, extra_body={
        "ignore_eos": True, "vllm_xargs": {"dlm_strategy": "static"}}
):
    print("streaming", flush=True)
"""
FORWARDS = "diffusion_num_denoising_steps_total"


def test_closing_a_stream_frees_the_request(server: Server):
    server.wait_until_idle()
    [before] = server.metrics(FORWARDS)
    stream = server.complete(stream=True, **ENDLESS)
    next(iter(stream))
    running, _, pages = server.load()
    assert running == 1 and pages > 0
    stream.close()
    server.wait_until_idle()
    [after] = server.metrics(FORWARDS)
    assert after - before < 960


def test_killing_the_client_mid_stream_frees_the_request(server: Server):
    server.wait_until_idle()
    [before] = server.metrics(FORWARDS)
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, f"{server.url}/v1", MODEL],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "streaming\n"
        running, _, pages = server.load()
        assert running == 1 and pages > 0
    finally:
        client.kill()
        client.wait()
    server.wait_until_idle()
    [after] = server.metrics(FORWARDS)
    assert after - before < 960


def test_leaving_without_a_stream_frees_the_request(server: Server):
    async def leave() -> None:
        async with openai.AsyncOpenAI(**server.client_options()) as client:
            request = asyncio.create_task(
                client.completions.create(model=MODEL, **split_options(ENDLESS))
            )
            await asyncio.to_thread(until, lambda: server.load()[0] == 1, "not running")
            request.cancel()

    server.wait_until_idle()
    [before] = server.metrics(FORWARDS)
    asyncio.run(leave())
    server.wait_until_idle()
    [after] = server.metrics(FORWARDS)
    assert after - before < 960


def mixed_requests(count: int) -> list[dict[str, Any]]:
    """Completions of all kinds; about a third will be left by their client."""
    rng = random.Random(7)
    requests = []
    for number in range(count):
        strategy = rng.choice(["static", "threshold", "factor", "learn2pd"])
        xargs: dict[str, Any] = {
            "dlm_strategy": strategy,
            "dlm_cache": rng.choice(["none", "prefix", "dual"]),
        }
        if strategy != "learn2pd":
            xargs["dlm_block_length"] = rng.choice([8, 16, 32])
        requests.append(
            {
                "prompt": "Ada Ben " * rng.randint(1, 40),
                "max_tokens": rng.choice([1, 7, 32, 64]),
                "temperature": rng.choice([0, 0.8]),
                "seed": number,
                "logprobs": rng.choice([None, 1]),
                "stop": rng.choice([None, "Ben"]),
                "stream": rng.random() < 0.5,
                "n": 1,
                "ignore_eos": rng.random() < 0.5,
                "vllm_xargs": xargs,
            }
        )
    for request in requests:
        if request["temperature"] and rng.random() < 0.3:
            request["n"] = 2
    return requests


@pytest.mark.parametrize("count", fast(50, of=(50, 100)))
def test_many_requests_with_aborts_leave_nothing_behind(server: Server, count: int):
    # Twice as many at a time as the server runs: some wait when they are left.
    requests = mixed_requests(count)
    delays = [random.Random(n).uniform(0, 0.5) for n in range(len(requests))]
    leaving = set(range(0, len(requests), 3))
    endless = set(range(0, len(requests), 9))
    left = []

    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        options = requests[number] | (ENDLESS if number in endless else {})
        reply: Any = await client.completions.create(
            model=MODEL, **split_options(options)
        )
        if not options["stream"]:
            return "".join(choice.text for choice in reply.choices)
        return "".join(
            [choice.text async for chunk in reply for choice in chunk.choices]
        )

    async def visit(
        client: openai.AsyncOpenAI, slots: asyncio.Semaphore, number: int
    ) -> None:
        async with slots:
            limit = delays[number] if number in leaving else REPLY_SECONDS
            try:
                await asyncio.wait_for(ask(client, number), limit)
            except TimeoutError:
                left.append(number)

    async def visit_all() -> None:
        slots = asyncio.Semaphore(32)
        async with openai.AsyncOpenAI(**server.client_options()) as client:
            await asyncio.gather(
                *(visit(client, slots, number) for number in range(len(requests)))
            )

    calm = server.text(max_tokens=32, ignore_eos=True)
    asyncio.run(visit_all())
    assert set(left) <= leaving and len(left) >= len(endless)
    server.wait_until_idle()
    assert server.text(max_tokens=32, ignore_eos=True) == calm
    # No slot is lost either: as many requests run at a time as before.
    with ThreadPoolExecutor(32) as pool:
        short = ENDLESS | {"max_tokens": 32}
        replies = [pool.submit(server.complete, **short) for _ in range(32)]
        until(lambda: server.load()[0] == 16, "a slot is lost")
    assert all(reply.result().usage.completion_tokens == 32 for reply in replies)
    server.wait_until_idle()


def test_aborts_while_waiting(server: Server):
    """More than the token budget holds: those that wait are left, then the rest."""
    streams = [server.complete(stream=True, **ENDLESS) for _ in range(20)]
    try:
        until(lambda: sum(server.load()[:2]) == 20, "20 requests are there")
        running, waiting, _ = server.load()
        assert 0 < running < waiting
        for stream in streams[-2:]:
            stream.close()
        until(lambda: server.load()[:2] == (running, waiting - 2), "2 are gone")
    finally:
        for stream in streams:
            stream.close()
    server.wait_until_idle()


def test_a_stop_string_ends_the_engines_work(server: Server, tokenizer: Tokenizer):
    """It is found by the front end, which then aborts the request."""
    vera = {str(tokenizer.token_to_id("Vera")): 100}
    server.wait_until_idle()
    [before] = server.metrics(FORWARDS)
    reply = server.complete(stop="Vera", logit_bias=vera, **ENDLESS)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("", "stop")
    server.wait_until_idle()
    [after] = server.metrics(FORWARDS)
    assert after - before < 960
