# SPDX-License-Identifier: Apache-2.0
"""Completions and chat through the `openai` client: parameters mean what they say.

What is compared is behaviour: answers of the model are not judged here.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from server.launch import MODEL, Server
from tiers import fast
from tokenizers import Tokenizer

from vllm_dlm.tasks.problems import NAMES

QUESTION = "Sort [Eva, Rosa, Hana, Hugo, Liam]"
NO_END = {"0": -100, "5": -100}
"""Bias against <|endoftext|> and <|eot_id|>."""
LONG: dict[str, Any] = {"max_tokens": 64, "logit_bias": NO_END}
"""A text of 64 tokens, over two blocks."""
WARM = {**LONG, "max_tokens": 24, "temperature": 1.5}
"""Drawn: few tokens, as a step writes hardly more than one."""


@pytest.fixture(scope="module")
def long_text(server: Server) -> str:
    text = server.text(QUESTION, **LONG)
    assert len(text) >= 64
    return text


@pytest.fixture(scope="module")
def vera(tokenizer: Tokenizer) -> int:
    """A token to ask for: a whole name, not in the question."""
    return tokenizer.token_to_id("Vera")


# -- names, lengths, ends -----------------------------------------------------


def test_the_alias_is_the_served_name(server: Server):
    assert [model.id for model in server.client.models.list()] == [MODEL]
    assert server.complete(max_tokens=4).model == MODEL


def test_chat_is_a_completion_of_the_rendered_prompt(
    server: Server, tokenizer: Tokenizer
):
    chat = server.chat(QUESTION, **LONG)
    rendered = (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{QUESTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    ids = tokenizer.encode(rendered, add_special_tokens=False).ids
    assert chat.usage.prompt_tokens == len(ids)
    assert chat.choices[0].message.role == "assistant"
    assert chat.choices[0].message.content == server.text(ids, **LONG)


def test_usage_counts(server: Server, tokenizer: Tokenizer):
    result = server.complete(QUESTION, return_token_ids=True, max_tokens=64)
    [choice] = result.choices
    assert result.usage.prompt_tokens == len(choice.prompt_token_ids)
    assert choice.prompt_token_ids == tokenizer.encode(QUESTION).ids
    assert result.usage.completion_tokens == len(choice.token_ids) <= 64
    assert choice.text == tokenizer.decode(choice.token_ids)


@pytest.mark.parametrize("max_tokens", fast(1, 45, of=(1, 5, 32, 45)))
def test_max_tokens(server: Server, max_tokens: int):
    result = server.complete(QUESTION, max_tokens=max_tokens, ignore_eos=True)
    assert result.usage.completion_tokens == max_tokens
    assert result.choices[0].finish_reason == "length"


def test_chat_without_max_tokens_has_the_rest_of_the_context(server: Server):
    # One step for each of the longest blocks: the canvas is as wide as the context.
    xargs = {"dlm_threshold": 0.001, "dlm_block_length": 256}
    result = server.chat(QUESTION, ignore_eos=True, vllm_xargs=xargs)
    assert result.usage.total_tokens == 1088
    assert result.choices[0].finish_reason == "length"


def test_end_of_text_min_tokens_and_ignore_eos(server: Server, tokenizer: Tokenizer):
    eos = tokenizer.token_to_id("<|endoftext|>")
    only_eos = {"logit_bias": {str(eos): 100}, "max_tokens": 40}
    ended = server.complete(**only_eos)
    assert (ended.usage.completion_tokens, ended.choices[0].text) == (1, "")
    assert ended.choices[0].finish_reason == "stop"

    late = server.complete(min_tokens=35, return_token_ids=True, **only_eos)
    assert late.usage.completion_tokens == 36
    assert eos not in late.choices[0].token_ids[:35]
    assert late.choices[0].finish_reason == "stop"

    ignored = server.complete(ignore_eos=True, return_token_ids=True, **only_eos)
    assert ignored.choices[0].token_ids == [eos] * 40
    assert ignored.choices[0].finish_reason == "length"


@pytest.mark.parametrize("is_included", [False, True])
def test_stop_string(server: Server, long_text: str, is_included: bool):
    middle = len(long_text) // 2
    stop = long_text[middle : middle + 3]
    result = server.complete(
        QUESTION, stop=stop, include_stop_str_in_output=is_included, **LONG
    )
    begin = long_text.index(stop)
    assert result.choices[0].text == long_text[: begin + 3 * is_included]
    assert result.choices[0].finish_reason == "stop"
    assert result.choices[0].stop_reason == stop


def test_stop_token(server: Server):
    ids = server.complete(QUESTION, return_token_ids=True, **LONG).choices[0].token_ids
    stop = ids[40]
    result = server.complete(
        QUESTION, stop_token_ids=[stop], return_token_ids=True, **LONG
    ).choices[0]
    assert result.token_ids == ids[: ids.index(stop) + 1]
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)


def test_stop_token_ends_the_text(server: Server, vera: int):
    only_vera = {"logit_bias": {str(vera): 100}, "max_tokens": 40}
    result = server.complete(
        stop_token_ids=[vera], return_token_ids=True, **only_vera
    ).choices[0]
    assert (result.token_ids, result.text) == ([vera], "")
    assert (result.finish_reason, result.stop_reason) == ("stop", vera)


# -- choosing tokens --------------------------------------------------------


def test_logit_bias(server: Server, vera: int):
    forced = server.text(QUESTION, max_tokens=6, logit_bias={str(vera): 100})
    assert forced == "Vera" * 6
    chat = server.chat(QUESTION, max_tokens=6, logit_bias={str(vera): 100})
    assert chat.choices[0].message.content == "Vera" * 6


def test_allowed_tokens_and_bad_words(server: Server, long_text: str, vera: int):
    text = server.text(QUESTION, max_tokens=6, allowed_token_ids=[vera])
    assert text == "Vera" * 6
    name = next(name for name in NAMES if name in long_text)
    assert name not in server.text(QUESTION, bad_words=[name], **LONG)


@pytest.mark.slow
def test_temperature_zero_repeats_itself(server: Server, long_text: str):
    assert server.text(QUESTION, **LONG) == long_text
    # Also the server's default: the model's generation_config.
    assert server.text(QUESTION, **{**LONG, "temperature": None}) == long_text


@pytest.mark.parametrize("temperature", fast(1.5, of=(0.8, 1.5)))
def test_seed(server: Server, temperature: float):
    def ask(seed: int) -> str:
        return server.text(QUESTION, **{**WARM, "temperature": temperature}, seed=seed)

    alone = [ask(seed) for seed in (1, 2, 3)]
    assert len(set(alone)) > 1
    # The same at any batch size, in any company.
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, (3, 2, 1, 3, 2, 1)))
    assert together == alone[::-1] * 2


def test_without_a_seed_texts_differ(server: Server):
    texts = {server.text(QUESTION, **WARM) for _ in range(3)}
    assert len(texts) == 3


def test_several_choices(server: Server):
    result = server.complete(QUESTION, n=2, **WARM)
    assert [choice.index for choice in result.choices] == [0, 1]
    first, second = (choice.text for choice in result.choices)
    assert first and second and first != second
    assert result.usage.completion_tokens == 2 * WARM["max_tokens"]

    seeded = server.chat(QUESTION, n=2, seed=5, **WARM)
    again = server.chat(QUESTION, n=2, seed=5, **WARM)
    texts = [choice.message.content for choice in seeded.choices]
    assert texts == [choice.message.content for choice in again.choices]


@pytest.mark.slow
def test_top_k_of_one_is_greedy(server: Server, long_text: str):
    hot = {**LONG, "temperature": 1.5}
    assert server.text(QUESTION, top_k=1, **hot) == long_text
    assert server.text(QUESTION, top_p=0.001, **hot) == long_text
    assert server.text(QUESTION, min_p=1.0, **hot) == long_text


# -- log-probabilities ----------------------------------------------------------


def test_logprobs_of_completions(server: Server):
    result = server.complete(QUESTION, logprobs=3, **LONG)
    logprobs = result.choices[0].logprobs
    count = result.usage.completion_tokens
    assert count == len(logprobs.tokens) == len(logprobs.token_logprobs)
    assert "".join(logprobs.tokens) == result.choices[0].text
    for token, value, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert value <= 0 and top[token] == value
        assert len(top) >= 3 and all(other <= 0 for other in top.values())


def test_logprobs_of_chat(server: Server):
    result = server.chat(
        QUESTION, logprobs=True, top_logprobs=2, max_tokens=48, ignore_eos=True
    )
    content = result.choices[0].logprobs.content
    assert len(content) == result.usage.completion_tokens == 48
    for item in content:
        first, second = item.top_logprobs
        # Greedy, and nothing forbidden: the most probable token was written.
        assert (item.token, item.logprob) == (first.token, first.logprob)
        assert second.logprob <= first.logprob <= 0


# -- streams --------------------------------------------------------------------


def test_completion_streams(server: Server, long_text: str):
    chunks = list(
        server.complete(
            QUESTION, stream=True, stream_options={"include_usage": True}, **LONG
        )
    )
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert sum(map(bool, pieces)) >= 2
    assert "".join(pieces) == long_text
    assert chunks[-1].usage.completion_tokens == 64


def test_chat_streams(server: Server):
    whole = server.chat(QUESTION, **LONG).choices[0].message.content
    chunks = list(server.chat(QUESTION, stream=True, **LONG))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert sum(map(bool, pieces)) >= 2
    assert "".join(pieces) == whole
    assert chunks[-1].choices[0].finish_reason == "length"


def test_streamed_choices_and_logprobs(server: Server):
    options = {**WARM, "n": 2, "seed": 3, "logprobs": 1}
    whole = server.complete(QUESTION, **options).choices
    texts, counts = ["", ""], [0, 0]
    for chunk in server.complete(QUESTION, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            counts[choice.index] += len(choice.logprobs.tokens)
    assert texts == [choice.text for choice in whole]
    assert counts == [WARM["max_tokens"]] * 2


def test_a_stop_string_ends_a_stream(server: Server, long_text: str):
    stop = long_text[40:44]
    stream = server.complete(QUESTION, stream=True, stop=stop, **LONG)
    text = "".join(chunk.choices[0].text for chunk in stream)
    assert text == long_text[: long_text.index(stop)]
