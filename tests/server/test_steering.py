# SPDX-License-Identifier: Apache-2.0
"""`vllm serve llama-tiny` steered by llama-tiny-draft, as its users see it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from server.launch import SIZES, VLLM, Server, running_server
from steering.reference import BASE, TUNED, Pair

from vllm_dlm.steering.options import Constant
from vllm_dlm.tasks.tokenizer import decode, encode_prompt

pytestmark = pytest.mark.slow

MU, KEEP = -2.0, 0.05
QUESTIONS = ["Copy [Ada, Ben, Carl]", "Sort [Noah, Finn, Jack, Ben]", "Add 57+22"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("steering")
    constant = Constant(
        mu=MU, keep=KEEP, tuned=TUNED, base=BASE, fit="mean", tokens=2, kept=2
    )
    (folder / "mu.json").write_text(json.dumps(constant.model_dump()))
    command = [VLLM, "serve", TUNED, *SIZES, "--kv-cache-memory-bytes", str(64 << 20)]
    command += ["--dlm-steer-base", BASE, "--dlm-steer-mu", str(folder / "mu.json")]
    with running_server(command, folder / "log", TUNED) as running:
        yield running


def test_texts_are_those_of_a_plain_loop(server: Server):
    pair = Pair()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda q: server.text(q, max_tokens=40), QUESTIONS))
    for question, text in zip(QUESTIONS, found, strict=True):
        wanted = pair.write(encode_prompt(question, False), 40, MU, KEEP)
        assert text == decode(wanted.token_ids)


def test_chats_streams_seeds_and_logprobs(server: Server):
    whole = server.chat(QUESTIONS[0], max_tokens=40).choices[0].message.content
    stream = server.chat(QUESTIONS[0], max_tokens=40, stream=True)
    assert "".join(each.choices[0].delta.content or "" for each in stream) == whole
    drawn = {"max_tokens": 40, "temperature": 1.0, "seed": 7}
    assert server.text(QUESTIONS[1], **drawn) == server.text(QUESTIONS[1], **drawn)
    found = server.complete(QUESTIONS[2], max_tokens=3, logprobs=2).choices[0].logprobs
    assert all(-1 < value <= 0 for value in found.token_logprobs)


def test_a_grammar(server: Server):
    text = server.text(
        QUESTIONS[0], max_tokens=8, structured_outputs={"regex": "[0-9]{3}"}
    )
    assert len(text) == 3 and text.isdigit()


def test_the_log_says_what_was_set(server: Server):
    assert server.log is not None
    log = server.log.read_text(errors="replace")
    assert "Steered decoding (SVDecode, arXiv 2509.15888)" in log
    assert f"with mu {MU:g}, tokens below {KEEP:g} of the best probability" in log
