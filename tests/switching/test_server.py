# SPDX-License-Identifier: Apache-2.0
"""`vllm-dlm serve-pair`, as its clients see it."""

from __future__ import annotations

import os
import re
import signal
from typing import Any

import httpx
import openai
import pytest
from server.launch import until
from switching.conftest import PROMPT, ask, running_pair
from switching.reference import write

pytestmark = pytest.mark.slow

PROMPTS = [[8 + row, 9, 20, 33, 70 - row][: 1 + row % 5] for row in range(8)]


def letters(choice: Any) -> str:
    """Who wrote each token: s or l."""
    return "".join(each["model"][0] * each["tokens"] for each in choice.segments)


def test_an_answer_is_the_references(pair, networks):
    reply = ask(pair, return_token_ids=True)
    [choice] = reply.choices
    expected = write(networks, PROMPT, 40, 2)
    assert choice.token_ids == expected.token_ids
    assert letters(choice) == expected.models
    assert "sl" in expected.models and "ls" in expected.models
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (4, 40)
    assert choice.finish_reason == "length"
    # Neighbours are one segment.
    assert len(choice.segments) == len(expected.switches) + 1


def test_a_stream_says_who_writes(pair):
    whole = ask(pair).choices[0]
    chunks = list(ask(pair, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == 40
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.text for choice in choices) == whole.text
    assert "".join(map(letters, choices)) == letters(whole)
    assert all(choice.segments for choice in choices)
    assert choices[-1].finish_reason == "length"


def test_many_prompts_and_many_texts(pair, networks):
    reply = ask(pair, PROMPTS, return_token_ids=True)
    for prompt, choice in zip(PROMPTS, reply.choices, strict=True):
        expected = write(networks, prompt, 40, 2)
        assert choice.token_ids == expected.token_ids
        assert letters(choice) == expected.models
    sampled = {"temperature": 1, "seed": 3, "n": 2}
    texts = ask(pair, PROMPTS[:3], **sampled).choices
    assert [choice.index for choice in texts] == list(range(6))
    for row, prompt in enumerate(PROMPTS[:3]):
        again = ask(pair, prompt, **sampled).choices
        assert [choice.text for choice in again] == [
            choice.text for choice in texts[2 * row : 2 * row + 2]
        ]
    streamed = ["", "", "", "", "", ""]
    for chunk in ask(pair, PROMPTS[:3], stream=True, **sampled):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in texts]


def test_chats(pair):
    options = {"max_tokens": 30, "ignore_eos": True}
    reply = pair.chat(**options)
    [choice] = reply.choices
    assert len(letters(choice)) == reply.usage.completion_tokens == 30
    chunks = [chunk.choices[0] for chunk in pair.chat(stream=True, **options)]
    assert chunks[0].delta.role == "assistant"
    assert "".join(each.delta.content or "" for each in chunks) == (
        choice.message.content
    )
    written = [each for each in chunks if hasattr(each, "segments")]
    assert "".join(map(letters, written)) == letters(choice)


def test_a_request_sets_its_own_rule(pair, networks):
    for tau, min_tokens in ((0, 7), (1.5, 10), ("inf", 10)):
        xargs = {"ead_tau": tau, "ead_min_tokens": min_tokens}
        [choice] = ask(pair, vllm_xargs=xargs).choices
        expected = write(networks, PROMPT, 40, float(tau), min_tokens=min_tokens)
        assert letters(choice) == expected.models


def test_stop_strings(pair):
    whole = ask(pair).choices[0]
    stop = whole.text[20:24]
    cut = ask(pair, stop=stop).choices[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vllm_xargs": {"ead_tau": -1}}, "tau: .*greater than or equal to 0"),
        ({"vllm_xargs": {"ead_taus": 1}}, "Did you mean 'ead_tau'"),
        ({"presence_penalty": 1}, "presence_penalty is not supported .* repetition"),
        ({"structured_outputs": {"regex": "a+"}}, "a grammar begins anew"),
        ({"stop_token_ids": [5000]}, "5000"),
        ({"max_tokens": 300}, "256"),
    ],
)
def test_refusals(pair, options, message, stream):
    with pytest.raises(openai.BadRequestError, match=message):
        ask(pair, stream=stream, **options)


def test_other_refusals(pair):
    with pytest.raises(openai.BadRequestError, match="use_beam_search is not supp"):
        ask(pair, use_beam_search=True, n=2)
    with pytest.raises(openai.NotFoundError, match="other"):
        pair.client.completions.create(model="other", prompt="a")
    [model] = pair.client.models.list().data
    assert (model.id, model.max_model_len) == ("pair", 256)


def test_metrics_are_of_both_engines(pair):
    names = [f"dlm:pair_{each}_total" for each in ("tokens", "cached_tokens")]
    before = pair.metrics(*names, "generation_tokens_total")
    switches = len(ask(pair).choices[0].segments) - 1
    after = pair.metrics(*names, "generation_tokens_total")
    assert after[0] - before[0] == 40
    assert after[1] > before[1]
    # A model's last step in a turn makes the token that ends it.
    assert after[2] - before[2] == 40 + switches
    lines = httpx.get(f"{pair.url}/metrics").text.splitlines()
    engines = [line for line in lines if line.startswith("vllm:num_requests_running{")]
    assert len(engines) == 2
    assert lines.count("# TYPE vllm:num_requests_running gauge") == 1


def test_leaving_ends_both_engines_work(pair):
    before = pair.metrics("generation_tokens_total")[0]
    stream = ask(pair, max_tokens=240, stream=True)
    for _ in range(12):
        next(iter(stream))
    stream.close()
    pair.wait_until_idle()
    assert pair.metrics("generation_tokens_total")[0] - before < 240


def test_a_server_on_the_other_runner(folders, networks, tmp_path):
    variables = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
    with running_pair(folders, tmp_path / "log", **variables) as pair:
        reply = ask(pair, PROMPTS, return_token_ids=True)
        for prompt, choice in zip(PROMPTS, reply.choices, strict=True):
            expected = write(networks, prompt, 40, 2)
            assert choice.token_ids == expected.token_ids
            assert letters(choice) == expected.models
        sampled = {"temperature": 1, "seed": 3, "n": 2}
        texts = [each.text for each in ask(pair, PROMPTS[:3], **sampled).choices]
        alone = [
            each.text
            for prompt in PROMPTS[:3]
            for each in ask(pair, prompt, **sampled).choices
        ]
        assert texts == alone
        assert "Using V2 Model Runner" in pair.log.read_text()


def test_a_dead_engine_ends_requests_and_health(pair):
    """The last test of this folder: it leaves no server to ask."""
    started = re.findall(r"EngineCore pid=(\d+)", pair.log.read_text())
    stream = ask(pair, max_tokens=240, stream=True)
    next(iter(stream))
    os.kill(int(started[0]), signal.SIGKILL)
    with pytest.raises(openai.APIError):
        list(stream)
    until(
        lambda: httpx.get(f"{pair.url}/health").status_code == 503, "it looks healthy"
    )
    with pytest.raises(openai.InternalServerError):
        ask(pair)
