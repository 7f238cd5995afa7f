# SPDX-License-Identifier: Apache-2.0
"""Step maps: the step of every token, its log-probability there, and replays."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine import block_cases
from engine.block_cases import BlockCase
from engine.cases import Case, expect, make_prompt
from engine.harness import Engine, Finished, params
from reference.checkpoints import write_checkpoint
from reference.llada import TinyLLaDA
from reference.network import TinyModel
from reference.procedures import CACHES
from tiers import fast

from vllm_dlm import StepMap, step_map

ASKS = {"step_map": True}


def with_map(sampling: Any, **dlm: Any) -> Any:
    """The same sampling parameters, and the request's options `dlm` besides."""
    sampling = sampling.clone()
    options = sampling.extra_args["dlm"] | ASKS | dlm
    sampling.extra_args = {"dlm": options}
    return sampling


def map_of(result: Finished) -> StepMap:
    found = step_map(result.output)
    lengths = {len(values) for name, values in vars(found).items() if name != "beyond"}
    assert lengths == {len(result.tokens)}
    return found


def replayed(sampling: Any, recorded: StepMap) -> Any:
    """The request that replays a recording of `sampling`."""
    config = {"recorded_steps": recorded.steps + recorded.beyond}
    return with_map(sampling, strategy="replay", strategy_config=config)


# -- full attention -----------------------------------------------------------


@pytest.mark.parametrize("cache", fast("dual", of=CACHES))
def test_steps_are_the_oracles(engine: Engine, oracle: TinyLLaDA, cache: str):
    """Also behind a text's end, over several blocks and canvases; some ask, some do
    not, some want log-probabilities too."""
    rules = ("static/low_confidence", "threshold", "factor", "cad/confidence")
    cases = [
        Case(
            make_prompt(length), rule, cache, max_tokens=36, ignore_eos=bool(length % 2)
        )
        for length, rule in zip((2, 19, 40, 7, 11, 30), itertools.cycle(rules))
    ]
    sampling = [case.params() for case in cases]
    asks = [with_map(one) if i % 4 else one for i, one in enumerate(sampling)]
    for i in (0, 1, 2):
        asks[i].logprobs = i
    results = engine.run([case.prompt for case in cases], asks)
    checked = 0
    for i, (case, result) in enumerate(zip(cases, results, strict=True)):
        wanted = expect(case, oracle)
        if wanted.near_tie:
            continue
        assert result.tokens == wanted.tokens
        if not i % 4:
            assert result.output.routed_experts is None
            continue
        found = map_of(result)
        assert found.steps == wanted.written_at
        assert not any(found.edited)
        if i < 3:
            entries = zip(result.tokens, result.output.logprobs, strict=True)
            assert found.logprobs == [entry[token].logprob for token, entry in entries]
        else:
            assert result.output.logprobs is None
        checked += 1
    assert checked >= 2


def test_log_probabilities_in_float64(engine: Engine, oracle: TinyLLaDA):
    """Each token's, recomputed from the oracle's logits of the step that wrote it."""
    case = Case(make_prompt(9), "threshold", max_tokens=32, ignore_eos=True, number=0.3)
    (result,) = engine.run([case.prompt], [with_map(case.params())])
    found = map_of(result)
    # The whole canvas is computed in every step: rebuild it as the map says.
    for step in range(max(found.steps) + 1):
        row = [*case.prompt] + [
            token if at < step else oracle.mask_id
            for token, at in zip(result.tokens, found.steps, strict=True)
        ]
        logits = oracle.forward(row)[len(case.prompt) :].double()
        logits[:, oracle.mask_id] = -torch.inf
        wanted = logits.log_softmax(dim=1)
        for i, at in enumerate(found.steps):
            if at == step:
                logprob = float(wanted[i, result.tokens[i]])
                assert found.logprobs[i] == pytest.approx(logprob, abs=1e-4)


@pytest.mark.slow
def test_preempted_requests_have_the_same_maps(small_engine: Engine):
    """Canvases of 32, so two per request; pages for three of six requests."""
    cases = [
        Case(make_prompt(12 + i), rule, max_tokens=60, ignore_eos=True, seed=i)
        for i, rule in zip(
            range(6), itertools.cycle(("static/random", "threshold", "factor"))
        )
    ]
    asks = [with_map(case.params(temperature=0.7)) for case in cases]
    alone = [
        small_engine.run([case.prompt], [one])[0]
        for case, one in zip(cases, asks, strict=True)
    ]
    outputs, _ = small_engine.run_short_of_pages([case.prompt for case in cases], asks)
    for output, result in zip(outputs, alone, strict=True):
        found = step_map(output)
        assert list(output.outputs[0].token_ids) == result.tokens
        wanted = map_of(result)
        assert found.steps == wanted.steps
        assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        assert max(found.steps) + 1 == result.forwards


def test_several_outputs_of_a_request(engine: Engine):
    sampling = params(24, dlm=ASKS, n=3, temperature=1.0, seed=4, ignore_eos=True)
    (output,) = engine.outputs([make_prompt(8)], sampling)
    maps = [step_map(one) for one in output.outputs]
    for i, one in enumerate(maps):
        alone = sampling.clone()
        alone.n, alone.seed = 1, 4 + i
        (single,) = engine.outputs([make_prompt(8)], alone)
        assert step_map(single).steps == one.steps
    assert len({tuple(one.logprobs) for one in maps}) == 3
    with pytest.raises(ValueError, match="3 outputs, with a step map each"):
        step_map(output)


def test_flat_option_and_none_at_all(engine: Engine):
    sampling = params(8, ignore_eos=True)
    (without,) = engine.outputs([make_prompt(8)], sampling)
    with pytest.raises(ValueError, match="set the request's option step_map"):
        step_map(without)
    sampling.extra_args = {"dlm_step_map": True, "dlm_strategy": "static"}
    (output,) = engine.outputs([make_prompt(8)], sampling)
    assert len(step_map(output).steps) == len(set(step_map(output).steps)) == 8


def test_a_stop_string_cuts_the_map(engine: Engine):
    """The engine goes on until the front end tells it to stop."""
    sampling = params(40, dlm=ASKS, ignore_eos=True, logprobs=0)
    (whole,) = engine.run([make_prompt(8)], sampling)
    stop = " ".join(whole.output.text.split()[18:22])
    sampling = sampling.clone()
    sampling.stop, sampling.output_text_buffer_length = [stop], len(stop)
    (output,) = engine.outputs([make_prompt(8)], sampling)
    (cut,) = output.outputs
    length = len(cut.token_ids)
    assert cut.finish_reason == "stop"
    assert 0 < length < 40
    assert len(cut.logprobs) == length
    assert step_map(cut).steps == map_of(whole).steps[:length]


REPLAYED = (
    *("static/low_confidence", "threshold", "eb"),
    *("learn2pd/off", "learn2pd/block", "learn2pd/token"),
)


@pytest.mark.parametrize("rule", fast("threshold", "learn2pd/token", of=REPLAYED))
def test_a_replay_is_the_same_text(engine: Engine, rule: str):
    """Greedy and drawn, over several blocks; one recording per request."""
    cases = [
        Case(make_prompt(10 + i), rule, block=8, max_tokens=40, seed=i)
        for i in range(4)
    ]
    prompts = [case.prompt for case in cases]
    sampling = [
        with_map(case.params(temperature=float(i % 2))) for i, case in enumerate(cases)
    ]
    recorded = engine.run(prompts, sampling)
    again = engine.run(
        prompts,
        [
            replayed(one, map_of(result))
            for one, result in zip(sampling, recorded, strict=True)
        ],
    )
    for one, other in zip(recorded, again, strict=True):
        assert other.tokens == one.tokens
        assert other.forwards == one.forwards
        assert map_of(other).steps == map_of(one).steps


def test_tokens_beyond_a_map_and_idle_steps(engine: Engine):
    """Recorded in steps 2 and 5 of a block of 8; then the other six, one by one."""
    dlm = {
        "strategy": "replay",
        "block_length": 8,
        "strategy_config": {"recorded_steps": [5, 2]},
    }
    (result,) = engine.run([make_prompt(8)], params(8, dlm=dlm | ASKS, ignore_eos=True))
    found = map_of(result)
    assert found.steps[:2] == [5, 2]
    assert sorted(found.steps[2:]) == [6, 7, 8, 9, 10, 11]
    assert result.forwards == 12


# -- block after block ---------------------------------------------------------


@pytest.fixture(
    scope="module", params=fast("nemotron", of=("fast_dllm_v2", "nemotron"))
)
def seeding(
    request: pytest.FixtureRequest,
    engines: Callable[..., Engine],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Engine, TinyModel]:
    """Blocks whose first token is a step of its own; pages for few requests."""
    name, dlm = {
        "fast_dllm_v2": ("Fast_dLLM_v2_7B", {"block_length": 16}),
        "nemotron": ("Nemotron-Labs-Diffusion-3B", {}),
    }[request.param]
    folder = write_checkpoint(
        request.param, tmp_path_factory.mktemp("model") / name, seed=2
    )
    engine = engines(
        dlm, model=str(folder), max_num_batched_tokens=64, num_gpu_blocks_override=13
    )
    return engine, TinyModel.from_folder(folder)


@pytest.mark.slow
def test_blocks_with_seeds(seeding: tuple[Engine, TinyModel]):
    """Steps, replays, preempted or not, of prompts that end anywhere in a block."""
    engine, oracle = seeding
    rules = ("static", "threshold", "factor", "dynamic")
    lengths = (9, 64, 95, 100, 130, 150)
    cases = [
        BlockCase(make_prompt(length), max_tokens=60, rule=rule, ignore_eos=True)
        for length, rule in zip(lengths, itertools.cycle(rules), strict=False)
    ]
    prompts = [case.prompt for case in cases]
    sampling = [with_map(case.params()) for case in cases]
    alone = [
        engine.run([case.prompt], [one])[0]
        for case, one in zip(cases, sampling, strict=True)
    ]
    # Of each rule one.
    for case, result in list(zip(cases, alone, strict=True))[:4]:
        wanted = block_cases.expect(case, oracle, engine)
        assert wanted.near_tie or map_of(result).steps == wanted.written_at
    again = [
        replayed(one, map_of(result))
        for one, result in zip(sampling, alone, strict=True)
    ]
    for asked in (sampling, again):
        outputs, _ = engine.run_short_of_pages(prompts, asked)
        for output, result in zip(outputs, alone, strict=True):
            assert list(output.outputs[0].token_ids) == result.tokens
            assert step_map(output).steps == map_of(result).steps


def test_drawn_blocks_with_seeds_are_replayed(seeding: tuple[Engine, TinyModel]):
    engine, _ = seeding
    case = BlockCase(make_prompt(21), max_tokens=50, rule="dynamic", ignore_eos=True)
    sampling = [with_map(case.params(temperature=1.0, seed=seed)) for seed in range(3)]
    recorded = engine.run([case.prompt] * 3, sampling)
    assert len({tuple(result.tokens) for result in recorded}) == 3
    again = engine.run(
        [case.prompt] * 3,
        [replayed(s, map_of(r)) for s, r in zip(sampling, recorded, strict=True)],
    )
    assert [r.tokens for r in again] == [r.tokens for r in recorded]
    # The seed's own probability is taken from its own forward.
    for one, other in zip(recorded, again, strict=True):
        assert map_of(one).logprobs == pytest.approx(map_of(other).logprobs, abs=1e-4)
        assert all(math.isfinite(value) for value in map_of(one).logprobs)


def test_a_seed_is_never_idle(seeding: tuple[Engine, TinyModel]):
    """Nothing would be left to compute until it is there."""
    engine, _ = seeding
    case = BlockCase(make_prompt(32), max_tokens=4)
    sampling = replayed(case.params(), StepMap([7, 3, 4, 5], [], [], []))
    (result,) = engine.run([case.prompt], [sampling])
    assert map_of(result).steps == [0, 3, 4, 5]
