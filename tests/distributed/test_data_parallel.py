# SPDX-License-Identifier: Apache-2.0
"""One server, two engines: as processes, and as actors of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from distributed.workers import youngest_workers
from server.launch import COMMAND, Server, running_server, until

from vllm_dlm.cli.server_process import ServerFailed, server_at

pytestmark = pytest.mark.slow

REPLICAS = [
    *("--data-parallel-size", "2", "--data-parallel-size-local", "2"),
    # By default there are as many HTTP processes as engines.
    *("--api-server-count", "1"),
]
QUESTIONS = {
    "Reverse [Ada, Ben, Carl]": "[Carl, Ben, Ada]",
    "Sort [Eva, Dan, Ada]": "[Ada, Dan, Eva]",
}


@pytest.fixture(scope="module")
def server(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It ends by itself: the last test here kills one of its workers."""
    command = [*COMMAND, *REPLICAS, "--data-parallel-backend", backend]
    log = tmp_path_factory.mktemp(backend) / "log"
    with (
        pytest.raises(ServerFailed, match="the server died"),
        running_server(command, log) as running,
    ):
        yield running


def answered(server: Server) -> dict[str, float]:
    """Requests that each engine has finished, by its number."""
    text = httpx.get(f"{server.url}/metrics").text
    lines = [
        line for line in text.splitlines() if line.startswith("vllm:request_success")
    ]
    counts: dict[str, float] = {}
    for line in lines:
        if 'engine="' in line and "_created" not in line:
            engine = line.partition('engine="')[2].partition('"')[0]
            value = float(line.rpartition(" ")[2])
            counts[engine] = counts.get(engine, 0.0) + value
    return counts


def test_both_engines_answer(server: Server):
    prompts = list(QUESTIONS) * 4
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(server.text, prompts))
    assert answers == [QUESTIONS[prompt] for prompt in prompts]
    counts = answered(server)
    assert counts.keys() == {"0", "1"}
    assert sum(counts.values()) == len(prompts)
    assert min(counts.values()) > 0


def test_a_lost_worker_ends_requests_with_an_error(server: Server, backend: str):
    """Whole answers and streamed ones; the server is gone afterwards."""
    # Four at once fit into a step of one engine: its canvas is computed whole.
    long = {
        "max_tokens": 256,
        "ignore_eos": True,
        "vllm_xargs": {"dlm_strategy": "static", "dlm_block_length": 8},
    }

    def whole(prompt: str) -> str:
        return server.text(prompt, **long)

    def streamed(prompt: str) -> str:
        events = server.complete(prompt, stream=True, **long)
        return "".join(event.choices[0].text for event in events)

    right = {prompt: whole(prompt) for prompt in QUESTIONS}
    process = server_at(server.url)
    with ThreadPoolExecutor(8) as pool:
        replies = [
            (prompt, pool.submit(ask, prompt))
            for ask in (whole, streamed)
            for prompt in list(QUESTIONS) * 2
        ]
        until(lambda: server.load()[0] == len(replies), "they do not run")
        youngest_workers(backend, 2)[0].kill()
    errors = []
    for prompt, reply in replies:
        if error := reply.exception():
            errors.append(error)
        else:  # the other engine was faster
            assert reply.result() == right[prompt]
    # A status of 500, an error in the stream, or a closed connection.
    assert len(errors) >= len(replies) // 2
    for error in errors:
        assert isinstance(error, openai.APIError | httpx.TransportError), error
        assert not isinstance(error, openai.APITimeoutError)
    process.wait(timeout=60)
