# SPDX-License-Identifier: Apache-2.0
"""A real engine of two models, held to a plain loop over both."""

from __future__ import annotations

import pytest
import torch
from tiers import fast

TIE = 1e-3


@pytest.mark.parametrize(
    ("mu", "keep", "count"),
    fast(
        (-1.2, 0.1, 4),
        of=[(-1.2, 0.1, 4), (0.0, 0.0, 4), (-1.2, 0.1, 20), (2.0, 0.0, 20)],
    ),
)
def test_texts_are_those_of_a_plain_loop(steered, pair, prompts, mu, keep, count):
    steered.set(mu, keep)
    found = steered.write(prompts[:count])
    wanted = [pair.write(prompt, 24, mu, keep) for prompt in prompts[:count]]
    for tokens, reference in zip(found, wanted, strict=True):
        assert tokens == reference.token_ids or reference.closest < TIE
    assert sum(each.closest < TIE for each in wanted) <= 1


def test_steering_changes_texts(steered, prompts):
    texts = {}
    for mu in (0.0, 2.0, -1.2):
        steered.set(mu, 0.0)
        # Of random tokens: of the questions the model is too sure.
        texts[mu] = steered.write(prompts[1:16:2], max_tokens=8)
    changed = [
        sum(one != other for one, other in zip(texts[0.0], texts[mu], strict=True))
        for mu in (2.0, -1.2)
    ]
    assert min(changed) > 2


def test_alone_as_in_a_batch(steered, prompts):
    beside = steered.write(prompts[:4], max_tokens=16)
    alone = [steered.write([one], max_tokens=16)[0] for one in prompts[:2]]
    assert alone == beside[:2]


def test_a_seed_gives_one_text(steered, prompts):
    steered.set(2.0, 0.0)
    options = {"temperature": 1.5, "max_tokens": 12}
    beside = steered.write(prompts[:4], seed=5, **options)
    for place in (0, 3):
        [alone] = steered.write(prompts[place : place + 1], seed=5, **options)
        assert alone == beside[place]
    assert steered.write(prompts[:4], seed=6, **options) != beside


def test_logprobs_are_of_the_steered_distribution(steered, pair, prompts):
    """Of written tokens, and of the prompt's."""
    steered.set(2.0, 0.0)
    [result] = steered.run(prompts[:1], logprobs=3, prompt_logprobs=0, max_tokens=4)
    text = list(prompts[0])
    for place in range(1, len(text)):
        wanted = pair.logits(text[:place], 2.0, 0.0).log_softmax(-1)
        found = result.prompt_logprobs[place][text[place]].logprob
        assert found == pytest.approx(wanted[text[place]].item(), abs=2e-3)
    output = result.outputs[0]
    for token, found in zip(output.token_ids, output.logprobs, strict=True):
        wanted = pair.logits(text, 2.0, 0.0).log_softmax(-1)
        assert set(wanted.topk(3).indices.tolist()) == set(found)
        for each, value in found.items():
            assert value.logprob == pytest.approx(wanted[each].item(), abs=2e-3)
        text.append(token)


@pytest.mark.slow
def test_penalties_are_upon_steered_logits(steered, pair, prompts):
    options = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "ignore_eos": True}
    found = steered.write(prompts[:4], max_tokens=12, **options)
    for prompt, tokens in zip(prompts[:4], found, strict=True):
        written: list[int] = []
        for token in tokens:
            logits = pair.logits(prompt + written, -1.2, 0.0)
            p = pair.logits(prompt + written, 0.0, 0.0).softmax(-1)
            logits[p < 0.1 * p.max()] -= 1e4
            seen = torch.tensor(sorted({*prompt, *written}))
            value = logits[seen]
            logits[seen] = torch.where(value > 0, value / 1.3, value * 1.3)
            logits[sorted(set(written))] -= 0.5
            best = logits.topk(2)
            assert token in best.indices[: 1 + (best.values.diff().abs() < TIE)]
            written.append(token)


def test_a_request_that_allows_improbable_tokens_only(steered, pair, prompts):
    """As a grammar may: the best of them is written."""
    [tokens] = steered.write(prompts[:1], allowed_token_ids=[70, 71, 72], max_tokens=1)
    logits = pair.logits(prompts[0], -1.2, 0.0)
    p = pair.logits(prompts[0], 0.0, 0.0).softmax(-1)
    assert (p[70:73] < 0.1 * p.max()).all()
    assert tokens == [70 + int(logits[70:73].argmax())]


def test_prefix_caching(steered, prompts):
    """Of both models' keys and values."""
    steered.set(8.0, 0.0)
    long = [(prompts[0] * 20)[:100], (prompts[1] * 20)[:100]]
    first = steered.run(long, max_tokens=8)
    again = steered.run(long, max_tokens=8)
    assert [each.num_cached_tokens for each in first] == [0, 0]
    assert [each.num_cached_tokens for each in again] == [96, 96]
    for one, other in zip(first, again, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids


@pytest.mark.slow
def test_chunked_prefill_and_preemption(steered, prompts):
    """More requests than the pages hold at a time."""
    long = [(prompt * 20)[:180] for prompt in prompts[:9]]
    found = steered.write(long, max_tokens=40, ignore_eos=True)
    for index in (3, 8):
        alone = steered.write([long[index]], max_tokens=40, ignore_eos=True)
        assert alone[0] == found[index]
