# SPDX-License-Identifier: Apache-2.0
"""`vllm serve llama-tiny` with a diffusion drafter, as its users see it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from server.launch import SIZES, VLLM, Server, running_server

from vllm_dlm.spec_decode.options import REQUEST_KEY

pytestmark = pytest.mark.slow

MODEL = "llama-tiny"
CONFIG = {"method": "deer", "model": "deer-tiny", "num_speculative_tokens": 16}
QUESTIONS = [
    "Copy [Ada, Ben, Carl]",
    "Sort [Noah, Finn, Jack, Ben]",
    "Add 57+22",
    "Spell djdgjyq backwards",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [VLLM, "serve", MODEL, *SIZES, "--kv-cache-memory-bytes", str(64 << 20)]
    command += ["--speculative-config", json.dumps(CONFIG)]
    log = tmp_path_factory.mktemp("speculation") / "log"
    with running_server(command, log, MODEL) as running:
        yield running


def without(question: str, server: Server, **options: object) -> str:
    return server.text(question, vllm_xargs={REQUEST_KEY: 0}, **options)


def test_the_same_texts_in_fewer_steps(server: Server):
    wanted = [without(question, server, max_tokens=40) for question in QUESTIONS]
    counters = ("spec_decode_num_drafts_total", "spec_decode_num_accepted_tokens_total")
    before = server.metrics(*counters)
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda q: server.text(q, max_tokens=40), QUESTIONS))
    drafts, accepted = (
        b - a for a, b in zip(before, server.metrics(*counters), strict=True)
    )
    assert texts == wanted
    # Several tokens a round, or the drafter is not what it was trained for.
    assert drafts > 0 and accepted > 2 * drafts


def test_the_log_says_what_was_set(server: Server):
    assert server.log is not None
    log = server.log.read_text(errors="replace")
    assert "Speculative decoding by deer (DEER, arXiv 2512.15176" in log
    assert "worker class SpeculativeWorker, model runner V1, synchronous" in log


def test_streaming(server: Server):
    wanted = without(QUESTIONS[0], server, max_tokens=40)
    stream = server.complete(QUESTIONS[0], max_tokens=40, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == wanted


def test_a_seed_gives_one_text(server: Server):
    options = {"max_tokens": 40, "temperature": 1.0, "seed": 7}
    alone = server.text(QUESTIONS[1], **options)
    with ThreadPoolExecutor(4) as pool:
        beside = [
            pool.submit(server.text, question, **options) for question in QUESTIONS
        ]
        assert beside[1].result() == alone


@pytest.mark.parametrize("limit", [17, -1, "two"])
def test_a_wrong_limit_is_refused(server: Server, limit: object):
    with pytest.raises(openai.BadRequestError, match="from 0 .no speculation. to 16"):
        server.complete(QUESTIONS[0], vllm_xargs={REQUEST_KEY: limit})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logprobs": 1, "logprob_token_ids": [5, 6]}, "logprob_token_ids cannot"),
        ({"vllm_xargs": {"dlm_strategy": "static"}}, "of diffusion language models"),
        ({"dlm_strategy": "static"}, "not read from the top level"),
    ],
)
def test_what_an_engine_would_ignore_or_die_of_is_refused(
    server: Server, options: dict[str, Any], message: str
):
    with pytest.raises(openai.BadRequestError, match=message):
        server.complete(QUESTIONS[0], **options)
    assert server.text(QUESTIONS[0], max_tokens=4)


@pytest.mark.parametrize("options", [{"dlm_steps": 4}, {REQUEST_KEY: 17}])
def test_options_are_refused_before_a_stream(
    server: Server, options: dict[str, object]
):
    for ask in (server.complete, server.chat):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(QUESTIONS[0], vllm_xargs=options, stream=True)
        assert next(iter(options)) in str(caught.value)
