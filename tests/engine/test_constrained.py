# SPDX-License-Identifier: Apache-2.0
"""Texts that must match a pattern do, whatever the strategy, cache and block length.

The tokens of the tiny models here are the words t0, t1, ..., without blanks between.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from engine.block_engines import BLOCK, BlockEngines
from engine.cases import make_prompt
from engine.harness import Engine, Finished, finished, params
from engine.test_no_waits import Waits
from tiers import fast
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from vllm_dlm import step_map
from vllm_dlm.config.carried import PATTERN

EOS = 121


@dataclass
class Wanted:
    """A request, and the pattern that its text must match, if any."""

    prompt: list[int]
    sampling: SamplingParams
    pattern: str | None


def add(engine: Engine, wanted: Wanted) -> str:
    """Enqueue a request with its pattern, as admission hands it over."""
    scheduler = engine.scheduler
    add_request = scheduler.add_request

    def with_pattern(request: Any) -> None:
        asked = request.sampling_params.extra_args or {}
        if wanted.pattern is not None:
            asked = {**asked, PATTERN: wanted.pattern}
        request.sampling_params.extra_args = asked
        add_request(request)

    scheduler.add_request = with_pattern
    try:
        return engine.add(wanted.prompt, wanted.sampling)
    finally:
        del scheduler.add_request


def run(
    engine: Engine, requests: Sequence[Wanted], meddle: Any = lambda step: None
) -> list[Finished]:
    names = [add(engine, wanted) for wanted in requests]
    done = engine.drive(meddle)
    return [finished(done[name].outputs[0]) for name in names]


def text_of(tokens: list[int]) -> str:
    kept = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
    return "".join(f"t{token}" for token in kept)


def assert_matches(result: Finished, wanted: Wanted) -> None:
    assert wanted.pattern is not None
    assert result.output.finish_reason in ("stop", "length"), result.output
    text = text_of(result.tokens)
    assert re.fullmatch(wanted.pattern, text), (wanted, text)


def pattern(choose: random.Random, depth: int = 3) -> str:
    """A random pattern over words."""
    kind = choose.random()
    if depth == 0 or kind < 0.25:
        words = [r"t\d", r"t[1-5]\d", "t7", r"t1\d", "t(3|4|55)", r"t\d\d?", "t99"]
        return choose.choice(words)
    if kind < 0.55:
        return pattern(choose, depth - 1) + pattern(choose, depth - 1)
    if kind < 0.75:
        return f"({pattern(choose, depth - 1)}|{pattern(choose, depth - 1)})"
    ending = choose.choice(["*", "?", "+", "{1,3}", "{2}"])
    return f"({pattern(choose, depth - 1)}){ending}"


STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "static", "steps": 8},
    {"strategy": "threshold", "strategy_config": {"threshold": 0.5}},
    {"strategy": "eb"},
    {"strategy": "dream", "strategy_config": {"alg": "entropy"}},
    {"strategy": "saber"},
    {"strategy": "hierarchy", "strategy_config": {"remask": True}},
    {"strategy": "multi_block"},
    {"strategy": "ete"},
    {"strategy": "joint", "strategy_config": {"edit": False}},
    {"strategy": "diffucoder"},
    {"strategy": "klass", "strategy_config": {"threshold": 0.5}},
    {"strategy": "prophet"},
    {"strategy": "credit", "strategy_config": {"threshold": 0.3}},
    # All masks at once, or nearly; then edits.
    {
        "strategy": "joint",
        "strategy_config": {"mask_threshold": 0.1, "edit_threshold": 0.0},
    },
    {"strategy": "joint", "strategy_config": {"preset": "speed", "penalty": 5.0}},
    {"strategy": "lopa", "strategy_config": {"branches": 3, "threshold": 0.5}},
    {"strategy": "freedave", "strategy_config": {"drafts": 4}},
    {"strategy": "freedave", "strategy_config": {"drafts": 3, "threshold": 0.4}},
]


def wanted(
    choose: random.Random, dlm: dict[str, Any], max_tokens: int = 0, **options: Any
) -> Wanted:
    """A random request whose pattern fits into its output."""
    length = max_tokens or choose.choice([24, 33, 48])
    return Wanted(
        [choose.randrange(100) for _ in range(choose.randrange(1, 40))],
        params(length, dlm=dlm, **options),
        pattern(choose),
    )


EACH_WAY = (0, 1, 4, *range(len(STRATEGIES) - 5, len(STRATEGIES), 2))
"""By schedule, by a threshold, with a memory, with edits, in branches, in drafts."""


@pytest.mark.parametrize("number", fast(*EACH_WAY, of=range(len(STRATEGIES))))
def test_texts_match(engine: Engine, number: int):
    choose = random.Random(number)
    requests = []
    for index in range(6):
        dlm = {
            "cache": ("none", "dual", "prefix")[index % 3],
            "block_length": (8, 32, 16)[(index // 2) % 3],
            "eotp": ("off", "token", "block")[index % 3],
            **STRATEGIES[number],
        }
        heat = {"temperature": 0.9, "seed": index} if index % 2 else {}
        if index == 3:
            heat |= {"top_k": 3}
        requests.append(wanted(choose, dlm, **heat))
    for result, request in zip(run(engine, requests), requests, strict=True):
        assert_matches(result, request)


def mixed(seed: int, count: int = 6) -> list[Wanted]:
    """Requests of several strategies, greedy and drawn."""
    choose = random.Random(seed)
    requests = []
    for number in range(count):
        dlm = {"block_length": choose.choice([8, 16]), "eotp": "token"}
        heat = {"temperature": 0.8, "seed": number} if number % 2 else {}
        dlm |= choose.choice(STRATEGIES[:5])
        requests.append(wanted(choose, dlm, **heat))
    return requests


def test_a_batch_is_its_requests_alone(engine: Engine):
    """And neighbours without a pattern are what they are without such neighbours."""
    requests = mixed(11)
    free = [replace(one, pattern=None) for one in mixed(12, 3)]
    together = run(engine, [*requests, *free])
    alone = [run(engine, [one])[0] for one in (*requests, *free)]
    assert together == alone
    for result, request in zip(together, requests, strict=False):
        assert_matches(result, request)


def test_a_replay_writes_the_same_text(engine: Engine):
    requests = mixed(13, 4)
    plain = run(engine, requests)
    names: list[str] = []

    def preempt(step: int) -> None:
        running = [r.request_id for r in engine.scheduler.running]
        if step in (3, 6) and running:
            names.append(running[-1])
            engine.preempt(running[-1])

    again = run(engine, requests, preempt)
    assert names
    assert [one.tokens for one in again] == [one.tokens for one in plain]


def test_a_text_of_the_least_length_fits(engine: Engine):
    """As many tokens as the shortest match has: the canvas is exactly filled."""
    requests = [
        Wanted([1, 2], params(length, dlm={"block_length": 8}), rf"(t\d){{{length}}}")
        for length in (1, 7, 8, 9, 20)
    ]
    for result, request in zip(run(engine, requests), requests, strict=True):
        assert_matches(result, request)
        assert len(result.tokens) == request.sampling.max_tokens


def test_a_text_has_its_least_length(engine: Engine):
    requests = [
        Wanted(
            make_prompt(5, seed),
            params(40, dlm={"block_length": 16, "eotp": mode}, min_tokens=least),
            r"(t\d\d)*",
        )
        for seed, (mode, least) in enumerate(
            [("off", 9), ("token", 21), ("block", 33), ("canvas", 40)]
        )
    ]
    for result, request in zip(run(engine, requests), requests, strict=True):
        assert_matches(result, request)
        assert len(text_of(result.tokens).split("t")) > request.sampling.min_tokens


def test_tokens_that_are_ruled_out_are_not_written(engine: Engine):
    (result,) = run(
        engine,
        [
            Wanted(
                [4],
                params(16, dlm={}, allowed_token_ids=[1, 2, 12, EOS]),
                r"(t\d+){6}",
            )
        ],
    )
    assert {*result.tokens} <= {1, 2, 12, EOS}
    (other,) = run(
        engine,
        [Wanted([4], params(16, dlm={}, logit_bias={2: 90.0}), r"(t\d){4}t5")],
    )
    assert other.tokens[:5] == [2, 2, 2, 2, 5]


def test_further_canvases_go_on_with_the_pattern(small_engine: Engine):
    requests = [
        Wanted(make_prompt(6, 1), params(80, dlm={"block_length": 16}), r"(t\d)*t55"),
        Wanted(make_prompt(7, 2), params(72, dlm={}), r"(t\d\dt1){20}(t7)*"),
    ]
    for result, request in zip(run(small_engine, requests), requests, strict=True):
        assert_matches(result, request)


def test_samples_are_different_and_match(engine: Engine):
    sampling = params(24, dlm={}, n=4, temperature=1.0, seed=5)
    sampling.output_kind = RequestOutputKind.FINAL_ONLY
    request = Wanted([3, 4], sampling, r"(t\d{1,2})+t9")
    name = add(engine, request)
    done = engine.drive(lambda step: None)
    texts = [text_of(list(one.token_ids)) for one in done[name].outputs]
    assert all(re.fullmatch(request.pattern or "", text) for text in texts)
    assert len({*texts}) == 4


def test_a_text_without_a_match_ends_with_an_error(engine: Engine):
    """The scheduler looks at what was written; the worker knew of no pattern here."""
    sampling = params(16, dlm={"block_length": 8}, ignore_eos=True)
    name = engine.add([5, 6], sampling)
    engine.step()
    (request,) = engine.scheduler.requests.values()
    request.sampling_params.extra_args = {
        **(request.sampling_params.extra_args or {}),
        PATTERN: "t1t1",
    }
    done = engine.drive(lambda step: None)
    assert done[name].outputs[0].finish_reason == "error"


def test_drafts_lose_nothing_under_a_pattern(engine: Engine):
    """`freedave` writes what one token a step does, in fewer forwards."""
    choose = random.Random(21)
    plain: list[Wanted] = []
    for number in range(6):
        heat = {"temperature": 0.7, "seed": number} if number % 2 else {}
        dlm = {"strategy": "static", "block_length": 8, "eotp": "off"}
        dlm["cache"] = ("none", "dual", "prefix")[number % 3]
        plain.append(wanted(choose, dlm, 40, **heat))
    drafted = []
    for one in plain:
        options = dict(one.sampling.extra_args["dlm"])
        options |= {"strategy": "freedave", "strategy_config": {"drafts": 4}}
        sampling = one.sampling.clone()
        sampling.extra_args = {"dlm": options}
        drafted.append(replace(one, sampling=sampling))
    static, found = run(engine, plain), run(engine, drafted)
    assert [one.tokens for one in found] == [one.tokens for one in static]
    fewer = [a.forwards < b.forwards for a, b in zip(found, static, strict=True)]
    assert all(fewer), "drafts were never right"


def test_edits_keep_to_the_pattern(engine: Engine):
    """They are made, and what they leave matches."""
    options = {"mask_threshold": 0.0, "edit_threshold": 0.0}
    sampling = params(
        24,
        dlm={
            "block_length": 8,
            "strategy": "joint",
            "strategy_config": options,
            "step_map": True,
        },
        temperature=1.0,
        seed=3,
    )
    requests = [Wanted([n, 2], sampling, r"(t\d\dt1?){3,6}t5") for n in range(6)]
    names = [add(engine, request) for request in requests]
    done = engine.drive(lambda step: None)
    outputs = [done[name].outputs[0] for name in names]
    for output, request in zip(outputs, requests, strict=True):
        assert_matches(finished(output), request)
    assert any(any(step_map(output).edited) for output in outputs)


@pytest.fixture(scope="module")
def sdar(engines: Callable[..., Engine], tmp_path_factory) -> BlockEngines:
    return BlockEngines(engines, tmp_path_factory.getbasetemp(), "SDAR-4B-Chat-b16")


@pytest.fixture(scope="module")
def fast_dllm(engines: Callable[..., Engine], tmp_path_factory) -> BlockEngines:
    """A model whose blocks begin with a seed; parts of 8 are decided together."""
    return BlockEngines(engines, tmp_path_factory.getbasetemp(), "Fast_dLLM_v2_7B")


@pytest.mark.parametrize("kind", fast("sdar", of=("sdar", "fast_dllm")))
def test_block_models(kind: str, request: pytest.FixtureRequest):
    model = request.getfixturevalue(kind)
    choose = random.Random(kind)
    requests = []
    for number in range(8):
        dlm = {**STRATEGIES[number % 2], "eotp": ("off", "token", "block")[number % 3]}
        if number == 7 and kind == "sdar":
            # Several blocks together.
            dlm = {"strategy": "multi_block", "block_length": 2 * BLOCK}
        heat = {"temperature": 0.9, "seed": number} if number % 2 else {}
        requests.append(wanted(choose, dlm, **heat))
    engine = model()
    together = run(engine, requests)
    for result, one in zip(together, requests, strict=True):
        assert_matches(result, one)
    assert [run(engine, [one])[0].tokens for one in requests[:4]] == [
        one.tokens for one in together[:4]
    ]
    again = run(
        engine,
        requests,
        lambda step: (
            engine.preempt(engine.scheduler.running[-1].request_id)
            if step == 4 and engine.scheduler.running
            else None
        ),
    )
    assert [one.tokens for one in again] == [one.tokens for one in together]


def test_asynchronous_engines_wait_for_the_host(engines: Callable[..., Engine]):
    requests = [*mixed(14, 4), *(replace(o, pattern=None) for o in mixed(15, 2))]
    usual = run(engines(), requests)
    ahead = run(engines(async_scheduling=True), requests)
    assert [one.tokens for one in ahead] == [one.tokens for one in usual]


def test_steps_wait_for_nothing_but_the_paths(engine: Engine):
    """What paths need comes in one transfer, which this does not count."""
    for request in mixed(16, 4):
        add(engine, request)
    engine.step()
    with Waits() as waits:
        for _ in range(4):
            engine.step()
    engine.drive(lambda step: None)
    assert not waits.seen


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_hundreds_of_random_patterns(engine: Engine, seed: int):
    choose = random.Random(1000 + seed)
    requests = []
    for number in range(24):
        dlm = {
            "cache": choose.choice(["none", "dual", "prefix"]),
            "block_length": choose.choice([4, 8, 16, 32, "canvas"]),
            "eotp": choose.choice(["off", "token", "block", "canvas"]),
            **choose.choice(STRATEGIES),
        }
        heat = {}
        if choose.random() < 0.5:
            heat = {"temperature": choose.choice([0.3, 1.0, 2.0]), "seed": number}
            heat |= choose.choice([{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
        requests.append(wanted(choose, dlm, choose.randrange(24, 80), **heat))
    for result, request in zip(run(engine, requests), requests, strict=True):
        assert_matches(result, request)
