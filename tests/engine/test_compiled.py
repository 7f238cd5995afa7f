# SPDX-License-Identifier: Apache-2.0
"""Engines whose steps are compiled: the oracle's tokens, in a handful of launches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from engine.block_engines import BlockEngines
from engine.cases import Case, assert_equal, expect, make_prompt, run_cases
from engine.harness import Engine, params
from engine.test_mixed import one_per_strategy
from engine.test_own_canvas import make_canvas
from reference.llada import TinyLLaDA
from torch._dynamo.utils import counters

# The benchmarks are no part of the package.
sys.path.append(str(Path(__file__).parents[2]))
from benchmarks.launches import count  # noqa: E402

sys.path.pop()

BLOCK = 32
"""All requests' here: a graph belongs to a block length."""
TWO = ("static/low_confidence", "threshold")


def case(number: int, rule: str, **options) -> Case:
    return Case(
        make_prompt(1 + 7 * number % 40, number),
        rule=rule,
        block=BLOCK,
        max_tokens=20 + 13 * number % 60,
        ignore_eos=number % 3 == 0,
        seed=number,
        **options,
    )


@pytest.fixture(scope="module")
def compiled(engines: Callable[..., Engine]) -> Engine:
    """Two strategies compiled at the start, no others."""
    return engines(
        dlm={"compile": "static,threshold", "block_length": BLOCK},
        max_num_seqs=16,
        num_gpu_blocks_override=160,
    )


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_the_oracles_tokens_whoever_comes_and_goes(compiled: Engine, oracle: TinyLLaDA):
    cases = [case(i, TWO[i % 2]) for i in range(8)]
    wanted = [expect(one, oracle) for one in cases]
    # The first batch has the engine compile.
    assert_equal(cases[:1], run_cases(compiled, cases[:1]), wanted[:1])
    made = graphs()
    groups = compiled.runner.sampler.groups.expected()
    assert [group.strategy.name for group in groups] == ["static", "threshold"]
    assert all(group.function.compiled for group in groups)
    for first, last in ((0, 8), (3, 4)):
        some = slice(first, last)
        assert_equal(cases[some], run_cases(compiled, cases[some]), wanted[some])
    assert graphs() == made


def test_compiled_and_not_in_one_batch(compiled: Engine, oracle: TinyLLaDA):
    """What asks for log-probabilities, or names another strategy, is not compiled."""
    made = graphs()
    cases = [case(i, (*TWO, "entropy")[i % 3]) for i in range(6)]
    wanted = [expect(one, oracle) for one in cases]
    sampling = [
        one.params(**({"logprobs": 2} if number % 4 == 1 else {}))
        for number, one in enumerate(cases)
    ]
    got = compiled.run([one.prompt for one in cases], sampling)
    assert_equal(cases, got, wanted)
    assert graphs() == made


def test_drawn_tokens_are_those_of_an_engine_that_compiles_nothing(
    compiled: Engine, wide_engine: Engine
):
    prompts = [make_prompt(9 + i, i) for i in range(6)]
    dlm = {"strategy": "threshold", "block_length": BLOCK}
    sampling = [
        params(40, dlm=dlm, temperature=0.8, seed=i, min_tokens=5) for i in range(6)
    ]
    got = compiled.run(prompts, sampling)
    assert got == wide_engine.run(prompts, sampling)


MOST_OPERATIONS, MOST_KERNELS = 30, 25
"""Of a step of one group of requests, outside the network; kernels are C++ loops."""
MOST_MORE = 8
"""Operations of each further group."""


def test_a_step_is_a_handful_of_launches(compiled: Engine):
    """For any number of requests, and of any group."""
    few, many = (count(compiled.llm, "compiled", "static", n) for n in (1, 16))
    assert few.step == many.step
    assert few.step.num_operations + few.step.copies <= MOST_OPERATIONS
    assert (few.step.functions, few.step.kernels <= MOST_KERNELS) == (1, True)
    assert few.admission.total == many.admission.total <= 4
    other = count(compiled.llm, "compiled", "threshold", 1)
    assert other.step.functions == 1
    # The batch's other two strategies are not compiled here.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slowfast", "saber", "learn2pd", "multi_block"])
def test_strategies_of_each_kind_compiled(
    name: str, engines: Callable[..., Engine], oracle: TinyLLaDA
):
    """A memory, edits, a filter, a canvas; model_executor/ compiles each strategy."""
    rule = one_per_strategy()[name]
    engine = engines(
        dlm={"compile": "all"}, max_num_seqs=16, num_gpu_blocks_override=160
    )
    cases = [case(i, rule) for i in range(8)]
    # As many steps as divide a block: learn2pd's oracle writes a fixed number in each.
    cases[::2] = [
        replace(one, steps=8 * -(-one.max_tokens // BLOCK)) for one in cases[::2]
    ]
    wanted = [expect(one, oracle) for one in cases]
    assert_equal(cases, run_cases(engine, cases), wanted)
    assert_equal(cases[:1], run_cases(engine, cases[:1]), wanted[:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SDAR-4B-Chat-b16"])
def test_block_models_compiled(
    name: str, engines: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
):
    model = BlockEngines(engines, tmp_path_factory.mktemp("compiled"), name)
    plain, compiled = model(), model(dlm={"compile": "all"})
    prompts = [make_prompt(3 + 11 * i, i) for i in range(6)]
    for strategy in ("threshold", "static"):
        sampling = [
            params(30 + 7 * i, dlm={"strategy": strategy}, ignore_eos=True)
            for i in range(6)
        ]
        got = compiled.run(prompts, sampling)
        assert got == plain.run(prompts, sampling)


def test_requests_with_a_canvas_among_others(compiled: Engine, oracle: TinyLLaDA):
    """Their steps are run as they stand; the group's others are served either way."""
    cases = [case(i, TWO[i % 2]) for i in range(6)]
    cases[1::2] = [
        replace(one, max_tokens=50, canvas=make_canvas(50, kind, 1))
        for one, kind in zip(cases[1::2], ("runs", "tail", "scattered"), strict=True)
    ]
    wanted = [expect(one, oracle) for one in cases]
    assert_equal(cases, run_cases(compiled, cases), wanted)
