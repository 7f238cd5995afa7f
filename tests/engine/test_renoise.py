# SPDX-License-Identifier: Apache-2.0
"""DiffusionGemma in our engine: the texts of transformers, fed the same random numbers.

And what vLLM's own code for this model has not: seeds, temperature 0, restrictions,
step maps, replays after preemption, a canvas' last forward saved.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.harness import Engine, params
from reference.diffusion_gemma import WINDOW, generate, write_random_checkpoint
from reference.llada import write_tokenizer
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSamplerConfig,
)
from vllm.exceptions import VLLMValidationError

from vllm_dlm.kernels.draw import random_tokens, row_key, token_noise

CANVAS, STEPS, CANVASES, VOCABULARY = 16, 6, 3, 128
PROMPTS = [
    [2, 5, 6, 7, 8],
    [2, 40, 30, 20, 10, 50, 60, 70],
    [(7 * i) % 99 for i in range(14)],
]
SETTLING = {
    **{"t_min": 0.1, "t_max": 0.2, "max_denoising_steps": 20, "entropy_bound": 1e3},
    **{"stability": 2, "confidence": 0.5},
}
"""With which canvases stand still before the last step."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_random_checkpoint(
        tmp_path_factory.mktemp("diffusion-gemma"),
        seed=0,
        canvas_length=CANVAS,
        # So that some canvases stand still.
        gain=0.3,
    )
    write_tokenizer(
        folder,
        vocab_size=VOCABULARY,
        mask_token_id=124,
        eos_token_id=1,
        max_length=160,
    )
    return folder


@pytest.fixture(scope="module")
def gemma(engines: Callable[..., Engine], folder: Path) -> Engine:
    return engines(
        {"diffusion_gemma": "engine"},
        model=str(folder),
        max_model_len=160,
        weight_transfer_config=None,
    )


def sampling(seed: int | None = 1, max_tokens: int = CANVASES * CANVAS, **options):
    options = {"temperature": 1.0, "ignore_eos": True, "detokenize": False} | options
    return params(max_tokens, seed=seed, **options)


def transformers_text(
    folder: Path, prompt: list[int], seed: int = 1, **settings: Any
) -> list[int]:
    """What transformers writes with the random numbers of our engine."""

    def place(canvas: int, step: int) -> tuple[torch.Tensor, ...]:
        first = len(prompt) + canvas * CANVAS
        positions = torch.arange(first, first + CANVAS)
        return torch.tensor(seed), positions, torch.tensor(step)

    return generate(
        folder,
        prompt,
        CANVASES,
        lambda *at: random_tokens(*place(*at), VOCABULARY),
        lambda *at: token_noise(row_key(*place(*at)), torch.arange(VOCABULARY)),
        **settings,
    )


def test_texts_are_those_of_transformers(gemma, folder):
    """Both layer scalars and the keys of finished canvases; batch 1 and 3."""
    together = gemma.run(PROMPTS, sampling())
    for prompt, found in zip(PROMPTS, together, strict=True):
        assert len(prompt) + CANVASES * CANVAS <= WINDOW
        assert found.tokens == transformers_text(folder, prompt)
        # vLLM's own code takes a forward more for each canvas.
        assert found.forwards == CANVASES * STEPS
    assert gemma.run(PROMPTS[1:2], sampling()) == together[1:2]


def test_a_canvas_ends_when_its_text_stands_still(gemma, folder):
    found = gemma.run(PROMPTS, sampling(dlm={"strategy_config": SETTLING}))
    for prompt, one in zip(PROMPTS, found, strict=True):
        assert one.tokens == transformers_text(
            folder,
            prompt,
            sampler_config=EntropyBoundSamplerConfig(entropy_bound=1e3),
            t_min=0.1,
            t_max=0.2,
            max_denoising_steps=20,
            stability_threshold=2,
            confidence_threshold=0.5,
        )
        assert CANVASES * 3 <= one.forwards < CANVASES * 20


def test_a_text_follows_from_its_seed(gemma):
    prompt = PROMPTS[0]
    asks = [sampling(seed) for seed in (3, 4, 3)]
    first, other, again = gemma.run([prompt] * 3, asks)
    assert first.tokens == again.tokens != other.tokens
    greedy = gemma.run([prompt] * 2, sampling(None, temperature=0.0))
    assert greedy[0].tokens == greedy[1].tokens
    assert (
        greedy[0].tokens == gemma.run([prompt], sampling(0, temperature=0.0))[0].tokens
    )
    drawn = [one.tokens for one in gemma.run([prompt] * 2, sampling(None))]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"allowed_token_ids": [3, 5, 80, 90]}, {3, 5, 80, 90}),
        ({"logit_bias": {7: 100.0}}, {7}),
        ({"logit_bias": {43: -100.0}, "min_p": 0.2, "top_k": 9, "top_p": 0.8}, None),
    ],
)
def test_restrictions_are_kept(gemma, options, allowed):
    found, plain = gemma.run(PROMPTS[:1] * 2, [sampling(**options), sampling()])
    assert found.tokens != plain.tokens and 43 in plain.tokens
    assert 43 not in found.tokens
    if allowed is not None:
        assert set(found.tokens) <= allowed


def test_top_k_of_one_leaves_nothing_to_draw(gemma):
    """All entropies are 0: every position is accepted, with its best token."""
    config = {"stability": 0, "confidence": 1e-6}
    ask = sampling(top_k=1, max_tokens=CANVAS, dlm={"strategy_config": config})
    for one in gemma.run(PROMPTS, ask):
        assert one.forwards == 1


def test_texts_end_with_their_stop_token(gemma):
    plain = gemma.run(PROMPTS[:1], sampling())[0].tokens
    stop = plain[CANVAS + 3]
    end = plain.index(stop) + 1
    ask = sampling(stop_token_ids=[stop])
    assert gemma.run(PROMPTS[:1], ask)[0].tokens == plain[:end]
    late = sampling(stop_token_ids=[stop], min_tokens=end + 1)
    longer = gemma.run(PROMPTS[:1], late)[0].tokens
    assert len(longer) > end and stop not in longer[: end + 1]
    short = gemma.run(PROMPTS[:1], sampling(max_tokens=5))[0].tokens
    assert short == plain[:5]


def test_logprobs_and_step_maps(gemma):
    dlm = {"strategy_config": SETTLING}
    ask = sampling(logprobs=2, dlm=dlm | {"step_map": True})
    found, plain = gemma.run(PROMPTS[:1] * 2, [ask, sampling(dlm=dlm)])
    assert found.tokens == plain.tokens
    for token, shown in zip(found.tokens, found.output.logprobs, strict=True):
        # The text is the best tokens of the last step.
        assert shown[token].rank == 1 and shown[token].logprob <= 0
    # Since when each has been the best: two steps at least before the canvas ends.
    steps = found.output.routed_experts[: len(found.tokens), 0].reshape(CANVASES, -1)
    assert all(len(set(own)) > 1 for own in steps)
    begins = [0, *(own.max() + 3 for own in steps)]
    assert found.forwards == begins[-1]
    for begin, own in zip(begins, steps, strict=False):
        assert own.min() >= begin


def test_a_preempted_canvas_is_replayed(gemma):
    expected = gemma.run(PROMPTS, sampling())
    ids = [gemma.add(prompt, sampling()) for prompt in PROMPTS]

    def preempt(step: int) -> None:
        if step in (2, STEPS + 3):
            (running,) = (
                request.request_id
                for request in gemma.scheduler.running
                if request.request_id.startswith(ids[1])
            )
            gemma.preempt(running)

    done = gemma.drive(preempt)
    tokens = [list(done[number].outputs[0].token_ids) for number in ids]
    assert tokens == [one.tokens for one in expected]


def test_chunked_prompts_and_found_pages_change_nothing(gemma, engines, folder):
    """Prompts longer than the window of the sliding layers, too."""
    small = engines(
        {"diffusion_gemma": "engine"},
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=160,
        max_num_batched_tokens=48,
        enable_prefix_caching=True,
        weight_transfer_config=None,
    )
    prompt = [(11 * i + 3) % 120 for i in range(100)]
    ask = sampling()
    expected = gemma.run([prompt], ask)[0].tokens
    assert small.run([prompt], ask)[0].tokens == expected
    again = small.outputs([prompt], ask)[0]
    assert list(again.outputs[0].token_ids) == expected
    assert again.num_cached_tokens > 0
    # How much of a finished canvas is found depends on the pages of the sliding layers
    # that vLLM keeps; what is found is right.
    longer = prompt + expected[: 2 * CANVAS]
    ask = sampling(max_tokens=CANVAS)
    found = small.outputs([longer], ask)[0]
    assert found.num_cached_tokens > 0
    assert list(found.outputs[0].token_ids) == gemma.run([longer], ask)[0].tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dlm", "options"),
    [
        ({"commit": "separate"}, {}),
        ({}, {"async_scheduling": True}),
        # The layers' scalars are hooks, which a compiled network must have too.
        ({}, {"enforce_eager": False}),
    ],
)
def test_how_forwards_are_made_changes_nothing(gemma, engines, folder, dlm, options):
    engine = engines(
        {"diffusion_gemma": "engine", **dlm},
        model=str(folder),
        max_model_len=160,
        weight_transfer_config=None,
        **options,
    )
    asks = [sampling(seed, dlm={"strategy_config": SETTLING}) for seed in (1, 2, 3)]
    expected = [one.tokens for one in gemma.run(PROMPTS, asks)]
    assert [one.tokens for one in engine.run(PROMPTS, asks)] == expected


def test_a_canvas_ends_with_the_context(gemma):
    """Of its last canvas a part alone exists."""
    prompt = [(5 * i + 1) % 120 for i in range(160 - CANVAS - 5)]
    found = gemma.run([prompt], sampling(max_tokens=CANVAS + 5))[0]
    assert len(found.tokens) == CANVAS + 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dlm": {"strategy": "threshold"}}, "It serves: renoise"),
        ({"dlm": {"eotp": "block"}}, "eotp is for models with a mask"),
        ({"dlm": {"reference_exact": True}}, "reference_exact is for models with"),
        ({"dlm": {"canvas": [1, 2, 3]}}, "is for models with a mask"),
        ({"dlm": {"block_length": 32}}, "block_length is 16"),
        ({"dlm": {"strategy_config": {"t_min": 0.9}}}, "t_min 0.9 is above t_max"),
        ({"extra_args": {"diffusion_max_steps": 3}}, "an option of DiffusionGemma"),
        ({"repetition_penalty": 1.5}, "repetition_penalty"),
        ({"bad_words": ["x"]}, "can be taken back"),
    ],
)
def test_what_cannot_be_honoured_is_refused(gemma, options, says):
    with pytest.raises((VLLMValidationError, ValueError), match=says):
        gemma.run(PROMPTS[:1], sampling(**options))


WRITTEN = "t40 t41 {{11}} t42 {{4}} t43 t44 {{20}} t45 {{3}}"
"""Two canvases and a half, the first positions written, and one in each of them."""
PINS = {0: 40, 1: 41, 13: 42, 18: 43, 19: 44, 40: 45}


def test_what_a_request_has_written_stays(gemma):
    """In every forward, and in the text: no step renoises it."""
    asks = [sampling(seed, 44, dlm={"canvas_text": WRITTEN}) for seed in (1, 2)]
    number = gemma.add(PROMPTS[0], asks[0])
    first, fed = len(PROMPTS[0]), []

    def note(step: int) -> None:
        if not gemma.scheduler.running:
            return
        name = gemma.scheduler.running[0].request_id
        slot = gemma.runner.req_states.req_id_to_index[name]
        table, canvas = gemma.runner.model_state.slots, slice(first, first + 44)
        fed.append(table.tokens[slot, canvas].tolist())
        assert not table.masked[slot, canvas][list(PINS)].any()
        assert all(fed[-1][at] == token for at, token in PINS.items())

    done = gemma.drive(note)[number].outputs[0]
    tokens = list(done.token_ids)
    assert len(tokens) == 44 and len(fed) >= 3 * STEPS - 1
    # What is open changes with most steps.
    assert len({tuple(one) for one in fed}) > len(fed) * 3 // 4
    assert [tokens[at] for at in PINS] == list(PINS.values())

    prompts = [*PROMPTS[:2], PROMPTS[0], PROMPTS[0]]
    moved = sampling(1, 44, dlm={"canvas_text": WRITTEN.replace("t42", "t52")})
    found = gemma.run(prompts, [asks[0], asks[1], asks[0], moved])
    assert found[0].tokens == found[2].tokens == tokens
    assert [found[1].tokens[at] for at in PINS] == list(PINS.values())
    assert found[3].tokens[13] == 52


def test_a_preempted_canvas_keeps_what_is_written(gemma):
    ask = sampling(1, 44, dlm={"canvas_text": WRITTEN})
    expected = gemma.run(PROMPTS[:2], ask)
    ids = [gemma.add(prompt, ask) for prompt in PROMPTS[:2]]

    def preempt(step: int) -> None:
        if step in (2, STEPS + 3):
            gemma.preempt(gemma.scheduler.running[1].request_id)

    done = gemma.drive(preempt)
    tokens = [list(done[number].outputs[0].token_ids) for number in ids]
    assert tokens == [one.tokens for one in expected]


def test_images_are_refused(gemma):
    prompt = {"prompt_token_ids": PROMPTS[0], "multi_modal_data": {"image": object()}}
    with pytest.raises(ValueError, match="text-only"):
        gemma.llm.generate([prompt], sampling(), use_tqdm=False)


def test_masked_models_refuse_renoise(engine):
    ask = params(8, dlm={"strategy": "renoise"})
    with pytest.raises((VLLMValidationError, ValueError), match="replaces masks"):
        engine.run([[1, 2, 3]], ask)
