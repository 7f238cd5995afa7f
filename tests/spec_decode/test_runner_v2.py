# SPDX-License-Identifier: Apache-2.0
"""Autoregressive models on vLLM's model runner V2, on a CPU with our kernels.

Greedy texts are those of model runner V1. What a seed draws is not: V1 draws from a
generator's state, V2 by a hash of seed and position.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from spec_decode.harness import params, ragged_prompts
from spec_decode.joint import PASSES, p_value
from transformers import AutoModelForCausalLM

PROMPTS = ragged_prompts(6)


@pytest.fixture(scope="module")
def second(engines: Any) -> Any:
    """The target without speculation, on model runner V2."""
    engine = engines(runner=2)
    assert type(engine.runner).__module__ == "vllm.v1.worker.cpu.model_runner"
    return engine


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.2},
        {"logit_bias": {5: 3.0, 9: -4.0}},
        {"allowed_token_ids": [5, 6, 7, 8, 9, 10]},
        {"min_tokens": 9, "stop_token_ids": list(range(3, 64))},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_greedy_texts_are_those_of_runner_v1(plain, second, options):
    asked = params(12, **options)
    texts = second.run(PROMPTS, asked)
    assert texts == plain.run(PROMPTS, asked)
    if not options:
        assert second.run(PROMPTS[2:3], asked) == texts[2:3]
    if "min_tokens" in options:
        assert {len(text) for text in texts} == {10}


def test_bad_words_are_those_of_runner_v1(plain, second):
    free = plain.run(PROMPTS, params(12))
    asked = [
        params(12, _bad_words_token_ids=[[text[0]], [text[3], text[4]]])
        for text in free
    ]
    texts = second.run(PROMPTS, asked)
    assert texts == plain.run(PROMPTS, asked) != free


def test_logprobs_are_the_models(target, second):
    """Of prompts and of texts, before penalties, with ranks."""
    asked = params(4, logprobs=3, prompt_logprobs=2, presence_penalty=0.5)
    network = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float64)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS[1:4]]
    for result in second.llm.generate(prompts, asked, use_tqdm=False):
        tokens = [*result.prompt_token_ids, *result.outputs[0].token_ids]
        with torch.no_grad():
            scores = network(torch.tensor([tokens])).logits[0].log_softmax(1)
        places = [*result.prompt_logprobs[1:], *result.outputs[0].logprobs]
        assert len(places) == len(tokens) - 1
        for row, token, place in zip(scores, tokens[1:], places, strict=False):
            assert token in place and {1, 2} <= {e.rank for e in place.values()}
            for known, entry in place.items():
                assert abs(entry.logprob - row[known]) < 1e-4
                assert entry.rank == (row >= row[known]).sum()


def test_a_seed_gives_one_text(second):
    asked = [
        params(12, temperature=0.8, seed=seed, top_p=0.9, top_k=20, min_p=0.01)
        for seed in (0, 1, 2, 3, 4, 1 << 40)
    ]
    texts = second.run(PROMPTS, asked)
    assert [second.run([PROMPTS[i]], asked[i])[0] for i in (1, 4)] == [
        texts[i] for i in (1, 4)
    ]
    seeded = [params(8, temperature=1.0, seed=seed) for seed in (1, 1, 2, 2)]
    same = second.run([PROMPTS[0]] * 4, seeded)
    assert same[0] == same[1] != same[2] == same[3]


def test_draws_have_the_models_distribution(target, second):
    prompt, samples = PROMPTS[1], 400
    network = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float64)
    with torch.no_grad():
        logits = network(torch.tensor([prompt])).logits[0, -1] / 1.5
    logits[logits < logits.topk(12).values[-1]] = -torch.inf
    texts = second.run([prompt] * samples, params(1, temperature=1.5, top_k=12))
    counted = torch.bincount(torch.tensor(texts)[:, 0], minlength=64)
    likely = logits.softmax(0)
    assert not counted[likely == 0].any()
    assert p_value(counted[likely > 0], likely[likely > 0]) > PASSES


def test_what_has_no_kernel_is_refused_at_start(target):
    from spec_decode.harness import Engine

    speculative = {"method": "ngram", "num_speculative_tokens": 2}
    speculative |= {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with pytest.raises(ValueError, match=r"speculative method 'ngram'.*to use V1"):
        Engine(target, speculative, runner=2)
