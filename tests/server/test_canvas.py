# SPDX-License-Identifier: Apache-2.0
"""A canvas over HTTP: suffix, texts with holes and their fields, streamed and not."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from server.launch import REPLY_SECONDS, Server
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
    text, fields = choice.message.content, choice.canvas_fields
    assert set(fields) == {"name"}
    assert "Copy" in text and "Ben" in text
    assert fields["name"].strip() in text
    stream = server.chat("Hello", vllm_xargs=options, stream=True)
    parts = [part.choices[0] for part in stream if part.choices]
    assert "".join(part.delta.content or "" for part in parts) == text
    # In the chunk that ends the answer, and in no other.
    assert [getattr(part, "canvas_fields", None) for part in parts] == [
        *[None] * (len(parts) - 1),
        fields,
    ]
    done = server.complete("Hello", vllm_xargs={"dlm_canvas_text": TEXT})
    assert set(done.choices[0].canvas_fields) == {"name"}


def test_fields_of_several_choices_in_a_stream(server: Server):
    """Beside frames, of two prompts and two samples, with holes that shrink."""
    options = {
        "prompt": ["Copy [Ada, Ben]", "Sort [Ben, Ada]"],
        "vllm_xargs": {
            "dlm_canvas_text": "{{a:6}} and {{b:9}}.",
            "dlm_holes": "shrink",
        },
        **{"n": 2, "temperature": 1, "seed": 1},
    }
    whole = server.complete(**options)
    expected = {one.index: (one.text, one.canvas_fields) for one in whole.choices}
    options["vllm_xargs"] |= {"dlm_frames": "writes"}
    texts = dict.fromkeys(expected, "")
    fields: dict[int, Any] = {}
    for chunk in server.complete(**options, stream=True):
        for one in chunk.choices:
            texts[one.index] += one.text
            if one.finish_reason is not None:
                fields[one.index] = one.canvas_fields
    assert {at: (text, fields[at]) for at, text in texts.items()} == expected


def test_names_where_answers_have_no_place_for_fields(
    server: Server, tokenizer: Tokenizer
):
    """They are refused, as step maps are; without names the canvas is filled."""
    pieces = ("Copy ", " and")
    length = 2 + sum(
        len(tokenizer.encode(piece, add_special_tokens=False).ids) for piece in pieces
    )
    messages = [{"role": "user", "content": "Hello"}]
    for path, body in {
        "/v1/responses": {"input": "Hello"},
        "/v1/messages": {"messages": messages, "max_tokens": length},
        "/v1/chat/completions/batch": {"messages": [messages]},
    }.items():

        def ask(
            xargs: dict[str, Any], path: str = path, body: dict[str, Any] = body
        ) -> httpx.Response:
            sent = {"model": server.model, "temperature": 0, "vllm_xargs": xargs}
            return httpx.post(
                server.url + path, json=sent | body, timeout=REPLY_SECONDS
            )

        refused = ask({"dlm_canvas_text": "Copy {{name:2}} and"})
        assert refused.status_code == 400, (path, refused.text)
        assert "no place for the texts in such holes" in refused.text, path
        refused = ask({"dlm_step_map": True})
        assert refused.status_code == 400, (path, refused.text)
        assert "no place for a step map" in refused.text, path
        answer = ask({"dlm_canvas_text": "Copy {{2}} and"})
        assert answer.status_code == 200, (path, answer.text)
        assert "Copy" in answer.text, path


def test_fields_of_holes_that_shrink(server: Server, tokenizer: Tokenizer):
    end = tokenizer.token_to_id("<|endoftext|>")
    answer = server.complete(
        "Hello",
        vllm_xargs={"dlm_canvas_text": "{{a:3}}Ada {{b:9}}Ben", "dlm_holes": "shrink"},
        logit_bias={str(end): 100},
        return_token_ids=True,
    )
    (choice,) = answer.choices
    assert choice.canvas_fields == {"a": "", "b": ""}
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
        (
            {"suffix": "a", "vllm_xargs": {"dlm_holes": "elastic"}},
            ["no expand_token_id", "'shrink'"],
            "vllm_xargs.dlm_holes",
        ),
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
