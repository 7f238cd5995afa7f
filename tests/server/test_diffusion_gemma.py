# SPDX-License-Identifier: Apache-2.0
"""DiffusionGemma over HTTP, in this package's engine, by its flag."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import openai
import pytest
from byte_model import write_byte_gemma
from reference.diffusion_gemma import write_random_checkpoint
from reference.llada import write_tokenizer
from server.launch import SIZES, VLLM, Server, running_server
from server.structured_cases import ADDRESS, FORMAT, PERSON, TOOL, text_of_stream

pytestmark = pytest.mark.slow

CANVAS, LENGTH = 16, 40
"""A text is two canvases and a half."""
PROMPT = "t5 t6 t7 t8"
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGP4z8"
    "DwHwAFAAH/iZk9HQAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="module")
def gemma_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("diffusion-gemma")
    write_random_checkpoint(folder, seed=0, canvas_length=CANVAS)
    write_tokenizer(
        folder, vocab_size=128, mask_token_id=124, eos_token_id=1, max_length=160
    )
    command = [VLLM, "serve", "--model", str(folder), *SIZES]
    command += ["--max-model-len", "160", "--dlm-diffusion-gemma", "engine"]
    with running_server(command, folder / "log", str(folder)) as running:
        yield running


def ask(server: Server, **options: Any) -> Any:
    options = {"max_tokens": LENGTH, "ignore_eos": True, "temperature": 1} | options
    return server.complete(PROMPT, **options)


def test_a_seed_and_temperature_0_repeat_a_text(gemma_server: Server):
    first, again, other = (ask(gemma_server, seed=seed) for seed in (1, 1, 2))
    assert first.usage.completion_tokens == LENGTH
    assert first.choices[0].text == again.choices[0].text != other.choices[0].text
    greedy = [ask(gemma_server, temperature=0).choices[0].text for _ in range(2)]
    assert greedy[0] == greedy[1] != ""
    # A choice draws by itself.
    both = ask(gemma_server, seed=1, n=2).choices
    assert both[0].text != both[1].text


def test_a_stream_brings_a_canvas_at_a_time(gemma_server: Server):
    whole = ask(gemma_server, seed=1, return_token_ids=True).choices[0]
    chunks = [
        chunk.choices[0]
        for chunk in ask(gemma_server, seed=1, stream=True, return_token_ids=True)
        if chunk.choices
    ]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    sizes = [len(chunk.token_ids) for chunk in chunks if chunk.token_ids]
    assert sizes == [CANVAS, CANVAS, LENGTH - 2 * CANVAS]
    assert [t for chunk in chunks for t in chunk.token_ids or []] == whole.token_ids


def test_a_chat_is_answered(gemma_server: Server):
    asked = {"max_tokens": CANVAS, "seed": 3, "temperature": 0.7, "ignore_eos": True}
    first, again = (gemma_server.chat("t9 t10", **asked) for _ in range(2))
    assert first.choices[0].message.content == again.choices[0].message.content != ""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"structured_outputs": {"regex": "t1( t2)*"}}, "ignore_eos"),
        ({"vllm_xargs": {"dlm_strategy": "threshold"}}, "It serves: renoise"),
        ({"vllm_xargs": {"dlm_block_length": 8}}, "block_length is 16"),
        ({"repetition_penalty": 1.5}, "repetition_penalty"),
        ({"vllm_xargs": {"diffusion_max_steps": 3}}, "an option of DiffusionGemma"),
    ],
)
def test_what_cannot_be_honoured_is_a_400(gemma_server: Server, options, says):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(gemma_server, **options)
    assert says in str(caught.value)


def test_an_image_is_a_400(gemma_server: Server):
    parts = [
        {"type": "text", "text": "t5"},
        {"type": "image_url", "image_url": {"url": PIXEL}},
    ]
    with pytest.raises(openai.BadRequestError) as caught:
        gemma_server.client.chat.completions.create(
            model=gemma_server.model, messages=[{"role": "user", "content": parts}]
        )
    assert "multimodal" in str(caught.value)


@pytest.fixture(scope="module")
def spelling_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same with the 256 bytes for tokens: it spells JSON."""
    folder = write_byte_gemma(tmp_path_factory.mktemp("bytes") / "gemma", CANVAS)
    command = [VLLM, "serve", "--model", str(folder), *SIZES]
    command += ["--max-model-len", "256", "--dlm-diffusion-gemma", "engine"]
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with running_server(command, folder.parent / "log", str(folder)) as running:
        yield running


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_schema_holds_the_answer(spelling_server: Server, temperature: int):
    """Streamed and not, several at once."""
    asked = {"response_format": FORMAT, "max_tokens": 128, "temperature": temperature}

    def answer(number: int) -> str:
        # At temperature 0 even the random tokens are the same without a seed.
        stream, seed = number % 2 == 1, number if temperature else None
        reply = spelling_server.chat("Who?", **asked, stream=stream, seed=seed)
        return text_of_stream(reply) if stream else reply.choices[0].message.content

    with ThreadPoolExecutor(4) as threads:
        texts = [*threads.map(answer, range(4))]
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    assert texts[2] == answer(2)
    assert len({*texts}) == (4 if temperature else 1)


TAG = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": "<where>",
        "content": {"type": "json_schema", "json_schema": ADDRESS},
        "end": "</where>",
    },
}


def test_other_constraints_hold_too(spelling_server: Server):
    def answer(**asked: Any) -> str:
        asked |= {"max_tokens": 100, "temperature": 1, "seed": 5}
        return spelling_server.text("Go", **asked)

    rules = 'root ::= "a" | "[" root2 "]"\nroot2 ::= [0-9]{2,9}'
    text = answer(structured_outputs={"grammar": rules})
    assert re.fullmatch(r"a|\[\d{2,9}\]", text)
    assert answer(structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no")
    reply = spelling_server.chat(
        "Go", response_format=TAG, max_tokens=100, temperature=1, seed=5
    )
    text = reply.choices[0].message.content
    tagged = re.fullmatch("<where>(.*)</where>", text, re.DOTALL)
    assert tagged is not None
    jsonschema.validate(json.loads(tagged[1]), ADDRESS)
    reply = spelling_server.chat(
        "Go", tools=[TOOL], tool_choice="required", max_tokens=120, temperature=1
    )
    for call in reply.choices[0].message.tool_calls:
        assert call.function.name == TOOL["function"]["name"]
        jsonschema.validate(json.loads(call.function.arguments), ADDRESS)


def test_too_few_tokens_for_a_match_are_a_400(spelling_server: Server):
    with pytest.raises(openai.BadRequestError) as caught:
        spelling_server.chat("Who?", response_format=FORMAT, max_tokens=20)
    assert "max_tokens to at least" in str(caught.value)
