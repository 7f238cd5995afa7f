# SPDX-License-Identifier: Apache-2.0
"""Canvases that grow: tokens, forwards and rows are the oracle's."""

from __future__ import annotations

import pytest
from engine.cases import Case, assert_equal, expect, make_prompt, run_cases
from engine.harness import Engine
from reference.cached_procedures import ALL_CACHES
from reference.growing import Growing
from reference.llada import TinyLLaDA
from tiers import fast

CACHES = [cache for cache in ALL_CACHES if cache != "window"]  # that is refused

RULES = (
    "threshold",
    "learn2pd/canvas",
    "static/low_confidence",
    "klass",
    "threshold/canvas",
    "joint/edit",
    "credit/fixed",
    "saber",
)
"""Some that remember steps, rewrite, or cut what has grown."""


def policy(number: int) -> Growing:
    """Thresholds that a random model is on both sides of."""
    if number % 2:
        return Growing("rho_eos", initial=12, expansion=4, threshold=0.25)
    threshold = (0.05, 0.15, 0.4)[number // 2 % 3]
    return Growing("daedal", 16, expansion=10, threshold=threshold, window=6)


def make_cases(cache: str) -> list[Case]:
    return [
        Case(
            make_prompt(length, 1),
            RULES[length % len(RULES)],
            cache,
            block=(8, 16)[length // 2 % 2],
            max_tokens=(96, 61)[length % 2],
            seed=length,
            growing=policy(length // len(RULES)),
        )
        for length in range(1, 25)
    ]


@pytest.mark.parametrize(
    ("cache", "every"), fast(("dual", 5), of=[("dual", 5), *((c, 1) for c in CACHES)])
)
def test_parity(engine: Engine, oracle: TinyLLaDA, cache: str, every: int):
    cases = make_cases(cache)[::every]
    wanted = [expect(case, oracle) for case in cases]
    got = run_cases(engine, cases)
    assert_equal(cases, got, wanted)
    alone = [run_cases(engine, [case])[0] for case in cases[::4]]
    assert alone == got[::4]


@pytest.mark.parametrize("cache", fast("dual", of=("none", "dual")))
@pytest.mark.slow
def test_a_preempted_request_grows_as_before(engine: Engine, cache: str):
    cases = make_cases(cache)[:8]
    wanted = run_cases(engine, cases)
    ids = [engine.add(case.prompt, case.params()) for case in cases]
    hit = 0

    def preempt_once_each(step: int) -> None:
        nonlocal hit
        running = [r for r in engine.scheduler.running if not r.num_preemptions]
        if step % 2 and running:
            engine.preempt(running[step % len(running)].request_id)
            hit += 1

    done = engine.drive(preempt_once_each)
    assert hit >= 4  # others were done before their turn
    got = [list(done[name].outputs[0].token_ids) for name in ids]
    assert got == [result.tokens for result in wanted]
