# SPDX-License-Identifier: Apache-2.0
"""The router's texts and switch points beside a reference in plain transformers.

On both model runners of vLLM.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from switching.conftest import make_router
from switching.reference import EOS, VOCAB, write
from tiers import fast
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_dlm.switching.entropy import LARGE, SMALL

PROMPTS = [
    [(7 * row + 3 * column) % 100 + 8 for column in range(length)]
    for row, length in enumerate((1, 2, 5, 17, 31, 32, 33, 70))
]
LENGTH = 32
"""Tokens of a text, unless a test says otherwise: enough for switches."""
TIE = 1e-4
"""Decisions closer than this may fall otherwise in another float32 program."""


def greedy(**options: Any) -> SamplingParams:
    """Greedy; `ead_*` options go to the rule."""
    rule = {key: options.pop(key) for key in list(options) if key.startswith("ead_")}
    options = {"temperature": 0, "ignore_eos": True, "max_tokens": LENGTH} | options
    return SamplingParams(**options, extra_args=rule)


def generate(router: Any, prompts: list[list[int]], params: Any) -> list[Any]:
    """The first text of each prompt."""
    tokens = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [each.outputs[0] for each in router.generate(tokens, params, use_tqdm=False)]


def letters(output: Any) -> str:
    """Who wrote each token: s or l."""
    return "".join(model[0] for model in output.models)


@pytest.mark.parametrize("tau", fast(1.5, of=(0, 1.5, 2, 2.5, 99)))
def test_tokens_and_switch_points_are_the_references(router, networks, tau):
    batch = generate(router, PROMPTS, greedy(ead_tau=tau))
    switches = 0
    for prompt, output in zip(PROMPTS, batch, strict=True):
        expected = write(networks, prompt, LENGTH, tau)
        assert expected.closest > TIE
        assert output.token_ids == expected.token_ids
        assert letters(output) == expected.models
        assert output.switches == expected.switches
        assert output.finish_reason == "length"
        switches += len(output.switches)
    assert switches == {0: 8, 99: 0}.get(tau, switches)
    if tau in (1.5, 2):
        assert switches > 8  # some texts go back and forth


@pytest.mark.slow
def test_alone_or_in_a_batch(router):
    params = [greedy(max_tokens=length) for length in (1, 10, 11, 12, 30, 41, 60, 61)]
    batch = generate(router, PROMPTS, params)
    for prompt, one, together in zip(PROMPTS, params, batch, strict=True):
        assert len(together.token_ids) == one.max_tokens
        [alone] = generate(router, [prompt], one)
        assert (alone.token_ids, alone.models) == (together.token_ids, together.models)


@pytest.mark.parametrize(
    ("window", "min_tokens"), fast((3, 4), of=((1, 1), (3, 4), (5, 20)))
)
def test_window_and_dwell(router, networks, window, min_tokens):
    rule = {"window": window, "min_tokens": min_tokens}
    params = greedy(ead_tau=2, **{f"ead_{name}": value for name, value in rule.items()})
    for prompt, output in zip(
        PROMPTS[:4], generate(router, PROMPTS[:4], params), strict=True
    ):
        expected = write(networks, prompt, LENGTH, 2, **rule)
        assert expected.closest > TIE
        assert (output.token_ids, letters(output)) == (
            expected.token_ids,
            expected.models,
        )
        assert all(each.tokens >= min_tokens for each in output.segments[:-1])


@pytest.mark.slow
def test_up_to_the_context_length(router, networks):
    [output] = generate(router, [PROMPTS[3]], greedy(max_tokens=None))
    expected = write(networks, PROMPTS[3], 256 - len(PROMPTS[3]), 2)
    assert expected.closest > TIE
    assert output.token_ids == expected.token_ids
    assert output.switches == expected.switches
    assert output.finish_reason == "length"


def test_nats_are_another_unit(router):
    bits = generate(router, PROMPTS[:3], greedy(ead_tau=2))
    nats = generate(router, PROMPTS[:3], greedy(ead_tau=1.3862944, ead_unit="nats"))
    assert [each.switches for each in bits] == [each.switches for each in nats]


def test_the_end_of_text_ends_both_models_turns(router, networks):
    params = greedy(ignore_eos=False, max_tokens=180)
    ended = 0
    prompts = PROMPTS[:5]
    for prompt, output in zip(prompts, generate(router, prompts, params), strict=True):
        expected = write(networks, prompt, 180, 2, ignore_eos=False)
        if expected.closest > TIE:
            assert output.token_ids == expected.token_ids
        if expected.token_ids[-1] == EOS:
            ended += 1
            assert output.finish_reason == "stop"
            break  # the reference takes far longer than the router
    assert ended


def test_costs_are_counted(router):
    for llm in router.llms.values():
        llm.reset_prefix_cache()
    prompt = PROMPTS[-1]
    [output] = generate(router, [prompt], greedy(ead_tau=1.5, max_tokens=70))
    assert len(output.segments) >= 3
    position = len(prompt)
    known = {SMALL: 0, LARGE: 0}
    for segment in output.segments:
        # What a model has seen and written is cached, in whole pages of 32.
        reused = known[segment.model] // 32 * 32
        assert segment.cached_tokens == reused
        assert segment.prefill_tokens == position - reused
        position += segment.tokens
        known[segment.model] = position - 1  # its last token was never fed to it
    assert output.cached_tokens > 0
    assert output.catch_up_tokens == sum(
        each.prefill_tokens for each in output.segments[1:]
    )
    assert sum(output.tokens_by_model.values()) == 70


def test_stop_strings_across_a_switch(router):
    [plain] = generate(router, [PROMPTS[2]], greedy(max_tokens=60))
    border = plain.switches[0]
    tokenizer = router.get_tokenizer()
    before = tokenizer.decode(plain.token_ids[:border])
    head = len(before)
    stop = plain.text[head - 2 : head + 2]
    start = plain.text.index(stop)
    assert start == head - 2  # it begins in one segment and ends in the next
    [output] = generate(router, [PROMPTS[2]], greedy(max_tokens=60, stop=[stop]))
    assert output.text == plain.text[:start]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == plain.token_ids[: len(output.token_ids)]
    assert sum(each.tokens for each in output.segments) == len(output.token_ids)
    assert output.segments[-1].model == LARGE
    [kept] = generate(
        router,
        [PROMPTS[2]],
        greedy(max_tokens=60, stop=[stop], include_stop_str_in_output=True),
    )
    assert kept.text == plain.text[: start + len(stop)]


def test_stop_tokens_and_the_fewest_tokens(router):
    [plain] = generate(router, [PROMPTS[1]], greedy(max_tokens=40))
    token = plain.token_ids[20]
    first = plain.token_ids.index(token)
    [output] = generate(
        router, [PROMPTS[1]], greedy(max_tokens=40, stop_token_ids=[token])
    )
    assert output.token_ids == plain.token_ids[: first + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", token)
    # Held back in every turn until the whole text has 25 tokens.
    [longer] = generate(
        router,
        [PROMPTS[1]],
        greedy(max_tokens=40, stop_token_ids=[token], min_tokens=25),
    )
    assert token not in longer.token_ids[:25]
    assert longer.switches


def test_a_seed_gives_one_text(router):
    def sampled(seed: int | None) -> SamplingParams:
        return greedy(temperature=1.0, seed=seed, ead_tau=2.5)

    batch = generate(router, PROMPTS, [sampled(seed) for seed in range(8)])
    again = generate(router, PROMPTS[::-1], [sampled(seed) for seed in range(8)][::-1])
    for one, two in zip(batch, again[::-1], strict=True):
        assert (one.token_ids, one.models) == (two.token_ids, two.models)
    for seed in (1, 6):
        [alone] = generate(router, [PROMPTS[seed]], sampled(seed))
        assert alone.token_ids == batch[seed].token_ids
        assert alone.models == batch[seed].models
    assert sum(len(each.switches) for each in batch) > 5
    [other] = generate(router, [PROMPTS[0]], sampled(77))
    assert other.token_ids != batch[0].token_ids


@pytest.mark.slow
def test_both_runners_take_the_entropy_before_a_repetition_penalty(routers):
    """V2 applies the penalty first; the same texts, which plain ones are not."""
    params = greedy(repetition_penalty=1.3)
    one, two = (generate(routers(runner), PROMPTS, params) for runner in ("V1", "V2"))
    assert [each.token_ids for each in one] == [each.token_ids for each in two]
    assert [each.models for each in one] == [each.models for each in two]
    plain = generate(routers("V2"), PROMPTS, greedy())
    assert sum(a.token_ids != b.token_ids for a, b in zip(one, plain, strict=True)) > 4
    assert sum(len(each.switches) for each in one) > 8


def test_turns_do_not_repeat_their_noise(router):
    """Uniform logits: a turn with the first turn's noise would repeat its tokens."""
    flat = greedy(
        temperature=2.0,
        seed=5,
        ead_tau=0,
        top_k=0,
        allowed_token_ids=list(range(8, 72)),
        logit_bias={token: 100.0 for token in range(8, 40)},
    )
    [output] = generate(router, [PROMPTS[0]], flat)
    [start] = output.switches
    assert output.token_ids[:10] != output.token_ids[start : start + 10]


def test_several_texts_of_a_prompt(router):
    params = greedy(temperature=1.0, seed=3, n=3)
    [result] = router.generate({"prompt_token_ids": PROMPTS[3]}, params, use_tqdm=False)
    texts = [tuple(each.token_ids) for each in result.outputs]
    assert [each.index for each in result.outputs] == [0, 1, 2]
    assert len(set(texts)) == 3
    [second] = generate(router, [PROMPTS[3]], greedy(temperature=1.0, seed=4))
    assert tuple(second.token_ids) == texts[1]


def test_logprobs_are_of_the_model_that_wrote(router, networks):
    # vLLM compiles a small function for logprobs, which takes longer than this test.
    with torch.compiler.set_stance("force_eager"):
        [output] = generate(router, [PROMPTS[2]], greedy(logprobs=2))
    assert len(output.logprobs) == len(output.token_ids) == LENGTH
    text = torch.tensor([PROMPTS[2] + output.token_ids])
    start = len(PROMPTS[2]) - 1
    with torch.no_grad():
        expected = {
            name: network(text).logits[0, start:-1].log_softmax(-1)
            for name, network in networks.items()
        }
    for place, (token, model) in enumerate(
        zip(output.token_ids, letters(output), strict=True)
    ):
        logprob = output.logprobs[place][token]
        assert logprob.logprob == pytest.approx(
            float(expected[model][place, token]), abs=1e-3
        )
        assert logprob.decoded_token is not None
    assert output.cumulative_logprob == pytest.approx(
        sum(
            each[token].logprob
            for each, token in zip(output.logprobs, output.token_ids, strict=True)
        )
    )


def test_prompt_logprobs(router):
    with torch.compiler.set_stance("force_eager"):
        [result] = router.generate(
            {"prompt_token_ids": PROMPTS[3]},
            greedy(prompt_logprobs=1),
            use_tqdm=False,
        )
    assert len(result.prompt_logprobs) == len(PROMPTS[3])
    assert result.outputs[0].switches


def test_the_reserved_token_is_never_written(router):
    assert router.stop_token_id == VOCAB - 1
    loud = greedy(logit_bias={VOCAB - 1: 100.0}, ead_tau=99)
    for output in generate(router, PROMPTS, loud):
        assert VOCAB - 1 not in output.token_ids
        assert len(output.token_ids) == LENGTH


def test_text_prompts_and_chats(router):
    result = router.generate("Copy [Ada, Ben]", greedy(), use_tqdm=False)[0]
    assert result.prompt == "Copy [Ada, Ben]"
    tokenizer = router.get_tokenizer()
    assert result.prompt_token_ids == tokenizer.encode("Copy [Ada, Ben]")
    assert result.outputs[0].text == tokenizer.decode(
        result.outputs[0].token_ids, skip_special_tokens=True
    )
    [same] = router.generate(result.prompt_token_ids, greedy(), use_tqdm=False)
    assert same.outputs[0].token_ids == result.outputs[0].token_ids
    assert router.generate([], greedy(), use_tqdm=False) == []
    question = [{"role": "user", "content": "Copy [Ada, Ben]"}]
    [answer] = router.chat(question, greedy(), use_tqdm=False)
    assert answer.prompt_token_ids == tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"presence_penalty": 1.0}, "presence_penalty is not supported"),
        ({"bad_words": ["Ada"]}, "bad_words is not supported"),
        ({"ead_tau": -1}, "tau: .*-1"),
        ({"ead_windows": 1}, "Did you mean 'ead_window'"),
        ({"ead_window": 30}, "must be at least window"),
        ({"allowed_token_ids": [5, 127]}, "127 is the token reserved"),
    ],
)
def test_parameters_that_are_refused(router, options, message):
    with pytest.raises(VLLMValidationError, match=message):
        generate(router, [PROMPTS[0]], greedy(**options))
    # Nothing is left behind.
    [output] = generate(router, [PROMPTS[0]], greedy(max_tokens=3))
    assert len(output.token_ids) == 3


def test_an_error_in_the_middle_leaves_nothing_behind(router, monkeypatch):
    engine = router.llms[LARGE].llm_engine

    def fail() -> None:
        raise RuntimeError("out of order")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "step", fail)
        with pytest.raises(RuntimeError, match="out of order"):
            generate(router, PROMPTS, greedy(ead_tau=0))
    assert not any(
        llm.llm_engine.has_unfinished_requests() for llm in router.llms.values()
    )
    assert generate(router, PROMPTS[:1], greedy())[0].finish_reason == "length"


def test_prompts_and_parameters_of_different_number(router):
    with pytest.raises(ValueError, match="2 prompts and 1 sampling parameters"):
        generate(router, PROMPTS[:2], [greedy()])


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_small_memory_and_prompts_in_parts(routers, folders, networks, runner):
    """Requests that wait, lose their memory and come back write the same texts."""
    router = routers(runner)
    # Pages for about three of eight texts, and forwards of at most 32 tokens.
    small = make_router(
        folders,
        runner,
        num_gpu_blocks_override=13,
        enable_chunked_prefill=True,
        max_num_batched_tokens=32,
        disable_log_stats=False,
    )
    outputs = generate(small, PROMPTS, greedy(max_tokens=80))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = write(networks, prompt, 80, 2)
        if expected.closest > TIE:
            assert output.token_ids == expected.token_ids
            assert output.switches == expected.switches
    preempted = [
        metric.value
        for metric in small.llms[SMALL].get_metrics()
        if metric.name == "vllm:num_preemptions"
    ]
    assert sum(preempted) > 0
    sampled = [greedy(temperature=1.0, seed=seed, max_tokens=80) for seed in range(8)]
    for one, two in zip(
        generate(small, PROMPTS, sampled),
        generate(router, PROMPTS, sampled),
        strict=True,
    ):
        assert (one.token_ids, one.models) == (two.token_ids, two.models)
    small.shutdown()
