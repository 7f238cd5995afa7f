# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities are those of the step that wrote the token, before sampling."""

from __future__ import annotations

import pytest
import torch
from engine.cases import Case, expect, make_prompt, run_cases
from engine.harness import Engine, params
from reference.llada import TinyLLaDA
from reference.procedures import CACHES, View
from tiers import fast


@pytest.mark.parametrize("cache", fast("dual", of=CACHES))
def test_greedy_tokens_best_and_second_best(
    engine: Engine, oracle: TinyLLaDA, cache: str
):
    """log c, and log (c - margin) for the second-best, from the oracle's forward."""
    cases = [
        Case(make_prompt(length, 2), rule, cache, max_tokens=44, ignore_eos=True)
        for length in (2, 19, 40)
        for rule in ("static/low_confidence", "threshold", "factor")
    ]
    results = run_cases(engine, cases, logprobs=2)
    for case, result in zip(cases, results, strict=True):
        seen: dict[int, tuple[float, float]] = {}

        def note(view: View, chosen: list[int], seen: dict = seen) -> None:
            for i in chosen:
                c = float(view.confidence[i])
                seen[view.first + i] = (c, c - float(view.margin[i]))

        expected = expect(case, oracle, observe=note)
        assert result.tokens == expected.tokens
        for place, token in enumerate(result.tokens):
            entry = result.output.logprobs[place]
            assert len(entry) == 2
            best, second = sorted(entry.values(), key=lambda e: e.rank)
            assert entry[token] is best
            assert (best.rank, second.rank) == (1, 2)
            wanted = torch.tensor(seen[place]).log()
            got = torch.tensor([best.logprob, second.logprob])
            torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-4)


def test_drawn_tokens_are_measured_before_temperature_and_restrictions(
    engine: Engine, oracle: TinyLLaDA
):
    prompt = make_prompt(11)
    logits = oracle.forward([*prompt, oracle.mask_id])[-1]
    logits[oracle.mask_id] = -torch.inf
    wanted = logits.log_softmax(dim=0)
    order = wanted.argsort(descending=True).tolist()
    sampling = [
        params(
            1,
            dlm={"block_length": 1},
            temperature=1.5,
            seed=seed,
            logit_bias={order[0]: -5.0, order[3]: 2.0},
            logprobs=3,
        )
        for seed in range(64)
    ]
    results = engine.run([prompt] * 64, sampling)
    assert len({result.tokens[0] for result in results}) > 8
    for result in results:
        (token,) = result.tokens
        (entry,) = result.output.logprobs
        assert {e.rank for e in entry.values()} >= {1, 2, 3}
        assert set(entry) == {token, *order[:3]}
        for i, e in entry.items():
            assert e.logprob == pytest.approx(float(wanted[i]), abs=1e-4)
            assert e.rank == order.index(i) + 1
        assert result.output.cumulative_logprob == pytest.approx(entry[token].logprob)


def test_requests_of_one_batch_ask_for_different_numbers(engine: Engine):
    asked = [None, 0, 1, 4, None, 2, 1, 0]
    sampling = [
        params(20, dlm={"block_length": 8}, logprobs=k, ignore_eos=True) for k in asked
    ]
    results = engine.run([make_prompt(10 + k) for k in range(8)], sampling)
    for k, result in zip(asked, results, strict=True):
        if k is None:
            assert result.output.logprobs is None
            continue
        assert len(result.output.logprobs) == len(result.tokens) == 20
        for token, entry in zip(result.tokens, result.output.logprobs, strict=True):
            # Greedy: the token itself is among the best.
            assert len(entry) == max(k, 1)
            assert token in entry
            assert all(e.logprob > -50 for e in entry.values())
