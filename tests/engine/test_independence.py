# SPDX-License-Identifier: Apache-2.0
"""A request's tokens depend on the request alone, and it leaves nothing behind."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
from engine.cases import RULES, Case, make_prompt
from engine.harness import Engine, drive
from reference.cached_procedures import ALL_CACHES
from tiers import fast
from vllm import SamplingParams

Request = tuple[tuple[int, ...], SamplingParams]
Tokens = list[list[int]]


def make_requests(count: int, max_tokens: int, longest: int) -> list[Request]:
    """Every rule and cache, blocks of 8 to 32, some drawn, some with logprobs."""
    requests = []
    for number in range(count):
        rule = RULES[2 * number % len(RULES)]
        case = Case(
            make_prompt(1 + 7 * number % longest, number),
            rule=rule,
            cache=ALL_CACHES[number % len(ALL_CACHES)],
            block=(8, 16, 32, 12)[number % 4],
            max_tokens=max_tokens - number % 5,
            ignore_eos=number % 2 == 0,
            seed=number,
            # Ends of text predicted from little, so that canvases are cut.
            number=0.05 if rule.startswith("learn2pd") else None,
        )
        more = {}
        if number % 3 == 1:
            more = {"temperature": 0.8, "top_p": 0.9 if number % 2 else 1.0}
        if number % 4 == 2:
            more["logprobs"] = 2
        requests.append((case.prompt, case.params(**more)))
    return requests


@pytest.fixture(scope="module", params=fast(9, of=(9, len(RULES))))
def requests(request: pytest.FixtureRequest) -> list[Request]:
    """By every second rule, one more than run at a time, or by all."""
    return make_requests(request.param, max_tokens=44, longest=60)


@pytest.fixture(scope="module")
def solo(engine: Engine, requests: list[Request]) -> Tokens:
    """What each request says when it is alone."""
    return [engine.run([prompt], sampling)[0].tokens for prompt, sampling in requests]


@pytest.fixture(scope="module", params=fast(7, of=(7, 14)))
def small_requests(request: pytest.FixtureRequest) -> list[Request]:
    return make_requests(request.param, max_tokens=90, longest=16)


@pytest.fixture(scope="module")
def small_solo(small_engine: Engine, small_requests: list[Request]) -> Tokens:
    return [
        small_engine.run([prompt], sampling)[0].tokens
        for prompt, sampling in small_requests
    ]


def test_mixed_batch_equals_solo_runs(
    engine: Engine, requests: list[Request], solo: Tokens
):
    prompts, sampling = zip(*requests, strict=True)
    assert [result.tokens for result in engine.run(prompts, sampling)] == solo


@pytest.mark.parametrize("seed", fast(1, of=(1, 2)))
@pytest.mark.slow
def test_order_of_admission(
    engine: Engine, requests: list[Request], solo: Tokens, seed: int
):
    order = random.Random(seed).sample(range(len(requests)), len(requests))
    prompts, sampling = zip(*(requests[i] for i in order), strict=True)
    got = [result.tokens for result in engine.run(prompts, sampling)]
    assert got == [solo[i] for i in order]


def test_requests_join_while_others_decode(
    engine: Engine, requests: list[Request], solo: Tokens
):
    number_of = {engine.add(*requests[0]): 0}

    def join(step: int) -> None:
        if step % 3 == 0 and len(number_of) < len(requests):
            number = len(number_of)
            number_of[engine.add(*requests[number])] = number

    done = drive(engine, join)
    assert {number_of[i]: result.tokens for i, result in done.items()} == dict(
        enumerate(solo)
    )


def test_neighbours_are_aborted(engine: Engine, requests: list[Request], solo: Tokens):
    source = random.Random(3)
    victims, number_of = [], {}
    for number, request in enumerate(requests):
        number_of[engine.add(*request)] = number
        victims.append(engine.add(*source.choice(requests)))
    unharmed = set(victims)

    def abort(step: int) -> None:
        running = [i for i in victims if i in unharmed]
        if step % 4 == 1 and running:
            engine.abort(running[0])
            unharmed.discard(running[0])

    done = drive(engine, abort)
    assert len(unharmed) < len(victims)
    got = {number_of[i]: done[i].tokens for i in number_of}
    assert got == dict(enumerate(solo))


def test_preempted_at_any_step(engine: Engine, requests: list[Request], solo: Tokens):
    source = random.Random(4)
    number_of = {engine.add(*request): i for i, request in enumerate(requests)}
    hit = 0

    def meddle(step: int) -> None:
        nonlocal hit
        running = [r for r in engine.scheduler.running if r.num_preemptions < 2]
        if step % 5 == 2 and running:
            engine.preempt(source.choice(running).request_id)
            hit += 1

    done = drive(engine, meddle)
    assert hit >= 0.6 * len(requests)
    got = {number_of[i]: result.tokens for i, result in done.items()}
    assert got == dict(enumerate(solo))


CUT = [*itertools.product(ALL_CACHES, ("learn2pd/token", "learn2pd/block"))]


@pytest.mark.parametrize(
    ("cache", "rule"),
    fast(("none", "learn2pd/token"), of=CUT),
)
def test_preempted_after_its_canvas_was_cut(engine: Engine, rule: str, cache: str):
    """The block is replayed with the canvas that it began with."""
    hit = 0
    for length in range(1, 33):
        prompt = make_prompt(length, 1)
        case = Case(prompt, rule, cache, block=8, max_tokens=40, number=0.02)
        engine.add(prompt, case.params())
        tokens, preempted = [], False
        while engine.busy:
            for request in list(engine.scheduler.running):
                cut = request.canvas_end < request.block_canvas_end
                if cut and request.num_output_tokens % 8 and not preempted:
                    engine.preempt(request.request_id)
                    preempted = True
            for output in engine.step():
                tokens = list(output.outputs[0].token_ids)
        hit += preempted
        if preempted:
            assert tokens == engine.run([prompt], case.params())[0].tokens
        if hit == 4:
            return
    raise AssertionError("too few cuts")


@pytest.mark.slow
def test_all_preempted_together(
    small_engine: Engine, small_requests: list[Request], small_solo: Tokens
):
    """Canvas after canvas; a block of 32 gets the time that it needs."""
    number_of = {
        small_engine.add(*request): i for i, request in enumerate(small_requests)
    }

    def reset(step: int) -> None:
        if step % 40 == 7:
            assert small_engine.llm.reset_prefix_cache(reset_running_requests=True)

    done = drive(small_engine, reset)
    got = {number_of[i]: result.tokens for i, result in done.items()}
    assert got == dict(enumerate(small_solo))


def test_memory_runs_out(
    small_engine: Engine, small_requests: list[Request], small_solo: Tokens
):
    """A further canvas finds no pages: someone is preempted, nobody notices."""
    prompts, sampling = zip(*small_requests, strict=True)
    outputs, preempted = small_engine.run_short_of_pages(prompts, sampling)
    assert len(preempted) >= 2
    assert [list(output.outputs[0].token_ids) for output in outputs] == small_solo


def stores(engine: Engine) -> Iterator[tuple[str, int]]:
    """Everything per request that scheduler, runner and our state keep: name, size."""
    scheduler, runner = engine.scheduler, engine.runner
    state, sampler = runner.model_state, runner.sampler
    yield "scheduler.requests", len(scheduler.requests)
    yield "scheduler.running", len(scheduler.running)
    yield "scheduler.waiting", len(scheduler.waiting)
    yield "runner slots", len(runner.req_states.req_id_to_index)
    parts = [part for part in vars(sampler).values() if hasattr(part, "__dict__")]
    # What is there before the first request is of no request.
    parts = [part for part in parts if part not in (sampler.facts, sampler.head)]
    for owner in (state, sampler, runner.req_states, *parts):
        for name, value in vars(owner).items():
            # Grows with the variety of requests, not with their number.
            if isinstance(value, dict) and name != "_groups":
                yield f"{type(owner).__name__}.{name}", len(value)


@pytest.mark.parametrize("count", fast(30, of=(30, 100)))
def test_nothing_is_left_of_many_requests(engine: Engine, count: int):
    engine.flush()
    pages = engine.free_pages
    source = random.Random(5)
    waiting = make_requests(count, max_tokens=24, longest=60)
    added: list[str] = []

    def meddle(step: int) -> None:
        for _ in range(min(source.randrange(4), len(waiting))):
            added.append(engine.add(*waiting.pop()))
        if source.random() < 0.2:
            engine.abort(source.choice(added))

    added.append(engine.add(*waiting.pop()))
    done = drive(engine, meddle)
    assert len(added) == count
    assert 0.5 * count <= len(done) <= 0.95 * count
    engine.flush()
    assert {name: size for name, size in stores(engine) if size} == {}
    assert engine.free_pages == pages
    assert sorted(engine.runner.req_states.free_indices) == list(range(8))
