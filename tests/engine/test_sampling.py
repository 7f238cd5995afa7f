# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters mean what they say, also where tokens come out of order."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from engine.cases import Case, expect, make_prompt
from engine.harness import Engine, params
from reference.llada import TinyLLaDA
from tiers import fast
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

PROMPTS = [make_prompt(3 + 5 * number, number) for number in range(8)]


def raw_logprobs(oracle: TinyLLaDA, prompt: tuple[int, ...], width: int):
    """[width, vocab]: of a canvas after the prompt, all masked; the mask id banned."""
    mask = oracle.mask_id
    logits = oracle.forward([*prompt, *[mask] * width])[-width:]
    logits[:, mask] = -torch.inf
    return logits.log_softmax(dim=1)


def drawn(seed: int, **options) -> SamplingParams:
    options = {"temperature": 0.8, "max_tokens": 24, "ignore_eos": True} | options
    return params(
        dlm={"block_length": 8, "strategy": "threshold"}, seed=seed, **options
    )


# --- Seeds ---------------------------------------------------------------------


def test_a_seed_means_the_same_text_at_any_batch_size(engine: Engine):
    sampling = [drawn(seed) for seed in range(8)]
    together = engine.run(PROMPTS, sampling)
    for row in (1, 6):
        assert engine.run([PROMPTS[row]], sampling[row]) == [together[row]]
    backwards = engine.run(PROMPTS[::-1], sampling[::-1])[::-1]
    assert together == backwards


def test_other_seeds_give_other_texts(engine: Engine):
    texts = engine.run([PROMPTS[0]] * 8, [drawn(seed) for seed in range(8)])
    assert len({tuple(text.tokens) for text in texts}) == 8


def test_without_a_seed_texts_differ(engine: Engine):
    # Drawn anew in every run: so warm that two are equal less than once in a million.
    sampling = drawn(0, temperature=2.0)
    sampling.seed = None
    texts = engine.run([PROMPTS[0]] * 4, sampling)
    assert len({tuple(text.tokens) for text in texts}) == 4


def test_n_gives_texts_of_successive_seeds(engine: Engine):
    (result,) = engine.outputs([PROMPTS[1]], drawn(5, n=2))
    both = [list(output.token_ids) for output in result.outputs]
    single = [engine.run([PROMPTS[1]], drawn(seed))[0].tokens for seed in (5, 6)]
    assert both == single
    assert both[0] != both[1]


# --- Which token is drawn -------------------------------------------------------


def test_top_k_of_one_is_greedy_at_any_temperature(engine: Engine):
    """Also in the number of forwards: confidence is measured without temperature."""
    greedy = engine.run(PROMPTS, drawn(0, temperature=0.0))
    assert engine.run(PROMPTS, drawn(1, temperature=2.0, top_k=1)) == greedy


def test_a_top_k_beyond_the_vocabulary_keeps_all_of_it(engine: Engine):
    every = [drawn(seed, top_k=128) for seed in range(8)]
    huge = [drawn(seed, top_k=2**63) for seed in range(8)]
    assert engine.run(PROMPTS, huge) == engine.run(PROMPTS, every)


def test_min_tokens_costs_nothing_behind_them(engine: Engine, monkeypatch):
    """Only blocks that hold them have their candidates chosen under a restriction."""
    candidates = engine.runner.sampler.candidates
    redo, calls = candidates._redo, []

    def counting(*args, **kwargs):
        calls.append(1)
        return redo(*args, **kwargs)

    monkeypatch.setattr(candidates, "_redo", counting)
    dlm = {"strategy": "static", "block_length": 16}
    asked = params(64, dlm=dlm, min_tokens=20, ignore_eos=True)
    (result,) = engine.run([PROMPTS[0]], asked)
    assert (result.forwards, len(calls)) == (64, 32)


def draw_many(engine: Engine, prompt, count: int, width: int = 1, **options):
    """`count` draws of `width` tokens, all in one forward."""
    dlm = {"block_length": width, "steps": 1, "strategy": "static"}
    sampling = [
        params(width, dlm=dlm, seed=seed, ignore_eos=True, **options)
        for seed in range(count)
    ]
    results = engine.run([prompt] * count, sampling)
    assert all(result.forwards == 1 for result in results)
    return Counter(tuple(result.tokens) for result in results)


def assert_distributed(counts: Counter, probability: dict) -> None:
    """Chi-square, cells with fewer than 5 expected draws pooled."""
    total = counts.total()
    assert set(counts) <= {cell for cell, p in probability.items() if p > 0}
    statistic, cells, rest, rest_expected = 0.0, 0, 0, 0.0
    for cell, p in probability.items():
        if p * total < 5:
            rest, rest_expected = rest + counts[cell], rest_expected + p * total
        else:
            statistic += (counts[cell] - p * total) ** 2 / (p * total)
            cells += 1
    if rest_expected > 1:
        statistic += (rest - rest_expected) ** 2 / rest_expected
        cells += 1
    assert cells >= 2
    freedom = cells - 1
    # Four standard deviations; the seeds, and so the draws, are always the same.
    assert statistic < freedom + 4 * math.sqrt(2 * freedom), (statistic, freedom)


def cells_of(*rows: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Joint probabilities of independent rows, [vocab] each."""
    tables = [list(enumerate(row.tolist())) for row in rows]
    return {
        tuple(token for token, _ in cell): math.prod(p for _, p in cell)
        for cell in itertools.product(*tables)
    }


@pytest.mark.slow
@pytest.mark.parametrize("temperature", (1.0, 0.6, 1.7))
def test_draws_follow_the_model(engine: Engine, oracle: TinyLLaDA, temperature: float):
    prompt = make_prompt(9, 4)
    (row,) = raw_logprobs(oracle, prompt, 1)
    counts = draw_many(engine, prompt, 1500, temperature=temperature)
    assert_distributed(counts, cells_of((row / temperature).softmax(dim=0)))


@pytest.mark.slow
def test_draws_at_two_positions_are_independent(engine: Engine, oracle: TinyLLaDA):
    prompt = make_prompt(9, 4)
    rows = raw_logprobs(oracle, prompt, 2)
    # Of both together, and so of each.
    counts = draw_many(engine, prompt, 1000, width=2, temperature=1.0)
    assert_distributed(counts, cells_of(*rows.exp()))


TRUNCATIONS: list[dict[str, Any]] = [
    *({"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.15}, {"top_k": 8, "top_p": 0.8})
]


@pytest.mark.parametrize("options", fast(TRUNCATIONS[3], of=TRUNCATIONS))
def test_truncation_leaves_the_rest_as_it_was(
    engine: Engine, oracle: TinyLLaDA, options: dict
):
    prompt = make_prompt(9, 4)
    (row,) = raw_logprobs(oracle, prompt, 1)
    p = row.exp()
    if "min_p" in options:
        p[p < options["min_p"] * p.max()] = 0
    if "top_k" in options:
        p[p < p.sort(descending=True).values[options["top_k"] - 1]] = 0
    if "top_p" in options:
        p = p / p.sum()
        values, ids = p.sort(descending=True)
        p[ids[values.cumsum(0) - values >= options["top_p"]]] = 0
    p = p / p.sum()
    counts = draw_many(engine, prompt, 400, temperature=1.0, **options)
    kept = {(token,) for token in p.nonzero()[:, 0].tolist()}
    assert set(counts) == kept
    assert_distributed(counts, cells_of(p))


@pytest.mark.parametrize("temperature", fast(0.9, of=(0.0, 0.9)))
def test_truncation_along_a_whole_text(engine: Engine, temperature: float):
    """Each token was among the three best of the step that wrote it."""
    sampling = drawn(3, temperature=temperature, top_k=3, logprobs=3)
    for result in engine.run(PROMPTS, sampling):
        ranks = [
            entry[token].rank
            for token, entry in zip(result.tokens, result.output.logprobs, strict=True)
        ]
        assert max(ranks) <= (3 if temperature else 1)


def test_logit_bias(engine: Engine, oracle: TinyLLaDA):
    greedy = engine.run(PROMPTS, drawn(0, temperature=0.0))
    common = Counter(token for result in greedy for token in result.tokens)
    (favourite, _), *_ = common.most_common()
    shunned = engine.run(
        PROMPTS, drawn(0, temperature=0.0, logit_bias={favourite: -100.0})
    )
    assert all(favourite not in result.tokens for result in shunned)
    forced = engine.run(PROMPTS[:2], drawn(0, logit_bias={7: 100.0}))
    assert all(result.tokens == [7] * 24 for result in forced)
    # The model itself is unsure of them: one a step.
    assert [result.forwards for result in forced] == [24, 24]
    # The mask id stays banned.
    masked = engine.run(PROMPTS[:2], drawn(0, logit_bias={oracle.mask_id: 100.0}))
    assert all(oracle.mask_id not in result.tokens for result in masked)


@pytest.mark.parametrize("temperature", fast(0.8, of=(0.0, 0.8)))
def test_allowed_token_ids(engine: Engine, oracle: TinyLLaDA, temperature: float):
    allowed = [3, 50, 99, oracle.mask_id]
    sampling = drawn(2, temperature=temperature, allowed_token_ids=allowed)
    results = engine.run(PROMPTS, sampling)
    seen = {token for result in results for token in result.tokens}
    assert seen == {3, 50, 99}


# --- Bad words -----------------------------------------------------------------


def bigrams(tokens: list[int]) -> list[tuple[int, ...]]:
    return list(itertools.pairwise(tokens))


PARALLEL = {"strategy": "factor", "strategy_config": {"factor": 100.0}}
"""A whole block in one step."""


@pytest.mark.parametrize(
    ("dlm", "temperature"),
    fast(
        (PARALLEL, 0.8),
        of=itertools.product(({"strategy": "static"}, PARALLEL), (0.0, 0.8)),
    ),
)
def test_bad_words(engine: Engine, dlm: dict, temperature: float):
    dlm = dlm | {"block_length": 8}
    options = {"temperature": temperature, "ignore_eos": True, "seed": 1}
    free = engine.run(PROMPTS, params(24, dlm=dlm, **options))
    sampling, banned = [], []
    for result in free:
        # Its commonest token (special ones are no words), and two pairs without it.
        plain = [token for token in result.tokens if token < 110]
        (token, _), *_ = Counter(plain).most_common()
        pairs = set(bigrams(plain)) & set(bigrams(result.tokens))
        pairs = [pair for pair in sorted(pairs) if token not in pair][:2]
        banned.append([(token,), *pairs])
        words = [" ".join(f"t{i}" for i in word) for word in banned[-1]]
        sampling.append(params(24, dlm=dlm, bad_words=words, **options))
    assert sum(len(words) for words in banned) >= 20
    for result, words in zip(engine.run(PROMPTS, sampling), banned, strict=True):
        found = {(token,) for token in result.tokens} | set(bigrams(result.tokens))
        assert len(result.tokens) == 24
        assert not found & set(words)


def test_bad_word_of_three_tokens_across_blocks(engine: Engine):
    """The pair that ends one block and the token that begins the next."""
    dlm = PARALLEL | {"block_length": 8}
    words = 0
    for prompt in PROMPTS:
        (free,) = engine.run([prompt], params(16, dlm=dlm, ignore_eos=True))
        word = free.tokens[6:9]
        if len(set(word)) < 3 or max(word) >= 110:
            continue  # it could be written earlier, or is no word
        words += 1
        text = " ".join(f"t{token}" for token in word)
        sampling = params(16, dlm=dlm, ignore_eos=True, bad_words=[text])
        (result,) = engine.run([prompt], sampling)
        assert result.tokens[:8] == free.tokens[:8]
        assert result.tokens[8] != free.tokens[8]
        assert word not in [result.tokens[i : i + 3] for i in range(14)]
    assert words >= 2


# --- The end of a text ----------------------------------------------------------


Ends = list[tuple[Case, list[int]]]


@pytest.fixture(scope="module")
def ends(oracle: TinyLLaDA) -> Ends:
    """Greedy requests that end by themselves, after at least two tokens."""
    found: Ends = []
    for length in range(1, 60):
        case = Case(make_prompt(length, 9), "factor", "dual", max_tokens=48)
        tokens = expect(case, oracle).tokens
        if 2 < len(tokens) < 40:
            found.append((case, tokens))
        if len(found) == 4:
            return found
    raise AssertionError("too few ends")


def test_min_tokens(engine: Engine, oracle: TinyLLaDA, ends: Ends):
    sampling = [case.params(min_tokens=len(tokens) + 5) for case, tokens in ends]
    results = engine.run([case.prompt for case, _ in ends], sampling)
    for result, (_, tokens) in zip(results, ends, strict=True):
        early = result.tokens[: len(tokens) + 5]
        assert len(early) == len(tokens) + 5
        assert oracle.eos_id not in early
    # Too few to matter.
    sampling = [case.params(min_tokens=len(tokens) - 1) for case, tokens in ends]
    results = engine.run([case.prompt for case, _ in ends], sampling)
    assert [result.tokens for result in results] == [tokens for _, tokens in ends]


def test_ignore_eos(engine: Engine, ends: Ends):
    sampling = [case.params(ignore_eos=True) for case, _ in ends]
    results = engine.run([case.prompt for case, _ in ends], sampling)
    for result, (_, tokens) in zip(results, ends, strict=True):
        assert len(result.tokens) == 48
        assert result.tokens[: len(tokens)] == tokens
        assert result.output.finish_reason == "length"


def test_finish_reason_of_eos(engine: Engine, oracle: TinyLLaDA, ends: Ends):
    results = engine.run(
        [case.prompt for case, _ in ends], [case.params() for case, _ in ends]
    )
    for result in results:
        assert result.tokens[-1] == oracle.eos_id
        assert (result.output.finish_reason, result.output.stop_reason) == (
            "stop",
            None,
        )


def test_stop_token_ids(engine: Engine):
    """The text ends at the first of them, in no more forwards than it takes."""
    free = engine.run(PROMPTS, drawn(0, temperature=0.0))
    stops = [result.tokens[5] for result in free]
    sampling = [drawn(0, temperature=0.0, stop_token_ids=[110, stop]) for stop in stops]
    cut = engine.run(PROMPTS, sampling)
    for result, whole, stop in zip(cut, free, stops, strict=True):
        assert result.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
        assert result.forwards < whole.forwards
        assert result.output.finish_reason == "stop"
        assert result.output.stop_reason == stop


def test_stop_ids_that_only_the_model_knows(busy_engine: Engine):
    """As <|eot_id|> of LLaDA-8B: they stop, unless it is too early or ignored."""
    dlm = {"block_length": 8}
    free = busy_engine.run(PROMPTS, params(24, dlm=dlm, ignore_eos=True))
    stopped = busy_engine.run(PROMPTS, params(24, dlm=dlm))
    later = busy_engine.run(PROMPTS, params(24, dlm=dlm, min_tokens=24))
    ends = 0
    for whole, result, long in zip(free, stopped, later, strict=True):
        assert len(long.tokens) == 24
        assert 11 not in long.tokens[:24]
        if 11 in whole.tokens and 121 not in whole.tokens[: whole.tokens.index(11)]:
            ends += 1
            assert result.tokens == whole.tokens[: whole.tokens.index(11) + 1]
    assert ends >= 2


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings(engine: Engine, include: bool):
    free = engine.run(PROMPTS[:4], drawn(0, temperature=0.0))
    for prompt, whole in zip(PROMPTS[:4], free, strict=True):
        words = whole.output.text.split()
        # Two words in a row, so that it is text that is looked at.
        stop = " ".join(words[5:7])
        sampling = drawn(
            0, temperature=0.0, stop=[stop], include_stop_str_in_output=include
        )
        (result,) = engine.outputs([prompt], sampling)
        (output,) = result.outputs
        begin = whole.output.text.index(stop)
        end = begin + len(stop) if include else begin
        assert output.text == whole.output.text[:end]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert not engine.busy


def test_longer_than_the_context(engine: Engine):
    """Offline, max_tokens is an upper bound as in vLLM (over HTTP it is refused)."""
    prompt = make_prompt(240)
    (result,) = engine.run([prompt], params(100, dlm={}, ignore_eos=True))
    assert len(result.tokens) == 256 - 240
    assert result.output.finish_reason == "length"
    with pytest.raises(VLLMValidationError, match="maximum model length of 256"):
        engine.run([make_prompt(256)], params(1))
    # Nothing of the refused request is left.
    assert not engine.busy
