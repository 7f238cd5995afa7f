# SPDX-License-Identifier: Apache-2.0
"""DiffusionGemma over HTTP, in this package's engine, by its flag."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from reference.diffusion_gemma import write_random_checkpoint
from reference.llada import write_tokenizer
from server.launch import SIZES, VLLM, Server, running_server

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
        ({"structured_outputs": {"regex": "t1( t2)*"}}, "renoise"),
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
