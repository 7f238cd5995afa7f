# SPDX-License-Identifier: Apache-2.0
"""A canvas over HTTP: suffix, texts with holes and their fields, streamed and not."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from server.launch import Server
from tokenizers import Tokenizer

TEXT = "Copy {{name:2}} and Ben {{8}} end"


def test_suffix(server: Server):
    answer = server.complete("Copy [Ada, ", suffix=" Ben]", max_tokens=6)
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 6
    assert not choice.text.endswith(" Ben]")
    stream = server.complete("Copy [Ada, ", suffix=" Ben]", max_tokens=6, stream=True)
    assert "".join(part.choices[0].text for part in stream) == choice.text


def test_suffix_of_several_prompts_and_choices(server: Server):
    prompts = ["Copy [Ada, ", "Sort [Ben, "]
    answer = server.complete(
        prompts, suffix=" Ben]", n=2, temperature=0.8, seed=1, max_tokens=5, logprobs=1
    )
    assert len(answer.choices) == 4
    assert all(len(one.logprobs.tokens) == 5 for one in answer.choices)


def test_fields_of_a_chat(server: Server):
    options = {"dlm": json.dumps({"canvas_text": TEXT})}
    answer = server.chat("Hello", vllm_xargs=options)
    (choice,) = answer.choices
    text, fields = choice.message.content, choice.fields
    assert set(fields) == {"name"}
    assert "Copy" in text and "Ben" in text
    assert fields["name"].strip() in text
    stream = server.chat("Hello", vllm_xargs=options, stream=True)
    parts = [part.choices[0].delta.content or "" for part in stream if part.choices]
    assert "".join(parts) == text
    done = server.complete("Hello", vllm_xargs={"dlm_canvas_text": TEXT})
    assert set(done.choices[0].fields) == {"name"}


def test_fields_of_holes_that_shrink(server: Server, tokenizer: Tokenizer):
    end = tokenizer.token_to_id("<|endoftext|>")
    answer = server.complete(
        "Hello",
        vllm_xargs={"dlm_canvas_text": "{{a:3}}Ada {{b:9}}Ben", "dlm_holes": "shrink"},
        logit_bias={str(end): 100},
        return_token_ids=True,
    )
    (choice,) = answer.choices
    assert choice.fields == {"a": "", "b": ""}
    given = [
        token
        for text in ("Ada ", "Ben")
        for token in tokenizer.encode(text, add_special_tokens=False).ids
    ]
    assert choice.token_ids == given
    assert getattr(choice, "routed_experts", None) is None


def test_with_ordinary_requests_at_once(server: Server):
    """Each is answered as it is alone."""
    asks: list[dict[str, Any]] = [
        {"max_tokens": 24},
        {"suffix": " Ben]", "max_tokens": 9},
        {"vllm_xargs": {"dlm_canvas_text": TEXT}},
        {"max_tokens": 24, "vllm_xargs": {"dlm_strategy": "factor"}},
        {"suffix": "!", "max_tokens": 12, "stream": True},
        {"vllm_xargs": {"dlm_canvas_text": "{{5}} Ada {{30}}"}},
    ]

    def text(options: dict[str, Any]) -> str:
        answer = server.complete(**options)
        if options.get("stream"):
            return "".join(part.choices[0].text for part in answer)
        return answer.choices[0].text

    alone = [text(options) for options in asks]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(text, asks * 3)) == alone * 3


def test_a_client_that_leaves(server: Server):
    stream = server.complete(
        vllm_xargs={"dlm_canvas_text": "Ada {{200}} Ben"}, stream=True
    )
    next(iter(stream))
    stream.close()
    assert server.text(suffix=" Ben]", max_tokens=4)


@pytest.mark.parametrize(
    ("options", "told", "parameter"),
    [
        ({"suffix": "a", "echo": True}, ["echo", "suffix"], "echo"),
        ({"suffix": ""}, ["suffix", "empty"], "suffix"),
        ({"suffix": "abcdefgh", "max_tokens": 1020}, ["widest", "1024"], "suffix"),
        ({"suffix": "a", "vllm_xargs": {"dlm_suffix": "b"}}, ["one place"], "suffix"),
        (
            {"max_tokens": 17, "vllm_xargs": {"dlm_canvas_text": "{{3}}"}},
            ["3 positions", "max_tokens is 17"],
            "vllm_xargs.dlm_canvas_text",
        ),
        (
            {"vllm_xargs": {"dlm_canvas_text": "{{a:1}}{{a:1}}"}},
            ["two holes"],
            "vllm_xargs.dlm_canvas_text",
        ),
        (
            {"vllm_xargs": {"dlm_canvas": [3, 4]}},
            ["no hole"],
            "vllm_xargs.dlm_canvas",
        ),
        (
            {"vllm_xargs": {"dlm_canvas_text": "{{1020}}"}, "prompt": "Ada " * 40},
            ["together more than"],
            "prompt",
        ),
        ({"vllm_xargs": {"dlm_holes": "shrink"}}, ["none"], "vllm_xargs.dlm_holes"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_refused(
    server: Server, options: dict[str, Any], told: list[str], parameter: str, stream
):
    with pytest.raises(openai.BadRequestError) as caught:
        server.complete(**options, stream=stream)
    for text in told:
        assert text in str(caught.value)
    assert caught.value.param == parameter
