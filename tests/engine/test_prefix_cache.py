# SPDX-License-Identifier: Apache-2.0
"""Block-causal requests share the KV of finished blocks, and of those only."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
from engine.block_cases import RULES, BlockCase, expect, run
from engine.block_engines import (
    BLOCK,
    PAGE,
    BlockEngines,
    assert_only_final_pages_are_published,
    recording,
    rows_of,
)
from engine.cases import Expected, assert_equal, assert_same_tokens, make_prompt
from engine.harness import Engine, drive
from tiers import fast

SDAR, FAST_DLLM = "SDAR-4B-Chat-b16", "Fast_dLLM_v2_7B"


@pytest.fixture(params=fast(SDAR, of=(SDAR, FAST_DLLM)), scope="module")
def model(
    engines: Callable[..., Engine], tmp_path_factory, request: pytest.FixtureRequest
) -> BlockEngines:
    """Each kind of model in turn; the second one's blocks begin with a seed."""
    return BlockEngines(engines, tmp_path_factory.getbasetemp(), request.param)


@pytest.fixture
def engine(model: BlockEngines) -> Engine:
    """With nothing to be found."""
    engine = model()
    assert engine.llm.reset_prefix_cache()
    return engine


only_sdar = pytest.mark.parametrize("model", [SDAR], indirect=True)
only_fast_dllm = pytest.mark.parametrize("model", [FAST_DLLM], indirect=True)


class Asked(NamedTuple):
    """One request, alone."""

    tokens: list[int]
    first: tuple[int, int]
    """Rows of its first forward."""
    cached: int
    """Prompt tokens that it says were found."""


def ask(engine: Engine, case: BlockCase) -> Asked:
    with recording(engine) as forwards:
        name = engine.add(case.prompt, case.params())
        while engine.busy:
            for output in engine.step():
                last = output
    tokens = list(last.outputs[0].token_ids)
    return Asked(tokens, rows_of(forwards, name)[0], last.num_cached_tokens)


def in_four_steps(prompt: tuple[int, ...], max_tokens: int = 20) -> BlockCase:
    return BlockCase(prompt, max_tokens, "static", steps_per_block=4, ignore_eos=True)


def test_the_rest_of_a_long_prompt_is_computed(model: BlockEngines, engine: Engine):
    """192 of 210 tokens are shared: six pages."""
    shared = make_prompt(192)
    cases = [in_four_steps(shared + make_prompt(18, seed)) for seed in (1, 2)]
    wanted = [expect(case, model.oracle, engine) for case in cases]
    cold, warm = (ask(engine, case) for case in cases)
    assert (cold.first, cold.cached) == ((0, 224), 0)
    assert (warm.first, warm.cached) == ((192, 224), 192)
    assert_same_tokens([cold.tokens, warm.tokens], wanted)


def check_twice(
    model: BlockEngines, engine: Engine, length: int, start: int, end: int
) -> None:
    case = in_four_steps(make_prompt(length))
    expected = expect(case, model.oracle, engine)
    cold, warm = ask(engine, case), ask(engine, case)
    assert (cold.first, cold.cached) == ((0, end), 0)
    assert (warm.first, warm.cached) == ((start, end), start)
    assert_same_tokens([cold.tokens, warm.tokens], [expected] * 2)


@only_sdar
@pytest.mark.parametrize(
    ("length", "start", "end"),
    [
        (31, 0, 32),  # its only page is not all prompt
        (32, 32, 48),  # nothing of the prompt is computed again
        (64, 64, 80),
        (70, 64, 80),
        (80, 64, 96),  # whole blocks, but half a page
        (95, 64, 96),
        (96, 96, 112),
    ],
)
def test_the_same_prompt_twice(
    model: BlockEngines, engine: Engine, length: int, start: int, end: int
):
    check_twice(model, engine, length, start, end)


@only_fast_dllm
@pytest.mark.parametrize(
    ("length", "start", "end"),
    [
        (31, 0, 32),
        (32, 0, 32),  # its last row predicts the seed
        (64, 32, 64),
        (70, 64, 80),
        (80, 64, 80),
        (95, 64, 96),
        (96, 64, 96),
    ],
)
def test_the_same_prompt_twice_where_a_seed_is_due(
    model: BlockEngines, engine: Engine, length: int, start: int, end: int
):
    check_twice(model, engine, length, start, end)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (41, 96),  # [96, 111) was open to the end
        (26, 64),  # [80, 96) was complete, but nobody needed its final KV
        (27, 96),
        (25, 64),
    ],
)
def test_an_answer_is_found_by_the_next_turn(
    model: BlockEngines, engine: Engine, answer: int, found: int
):
    first = in_four_steps(make_prompt(70), answer)
    spoken = ask(engine, first).tokens
    second = in_four_steps((*first.prompt, *spoken, *make_prompt(200 - 70 - answer)))
    expected = expect(second, model.oracle, engine)
    asked = ask(engine, second)
    assert (asked.first, asked.cached) == ((found, 208), found)
    assert_same_tokens([asked.tokens], [expected])


def test_pages_are_found_in_the_forward_that_computes_them(
    model: BlockEngines, engine: Engine
):
    shared = make_prompt(128)
    cases = [in_four_steps(shared + make_prompt(9, seed)) for seed in (1, 1, 2)]
    wanted = [expect(case, model.oracle, engine) for case in cases]
    with recording(engine) as forwards:
        ids = [engine.add(case.prompt, case.params()) for case in cases]
        done = drive(engine, lambda step: None)
    firsts = [(forwards[0][i].start, forwards[0][i].end) for i in ids]
    assert firsts == [(0, 144), (128, 144), (128, 144)]
    assert_same_tokens([done[i].tokens for i in ids], wanted)


def test_prompts_that_differ_in_one_token(model: BlockEngines, engine: Engine):
    """The last of a page, of a block, of the prompt."""
    prompt = make_prompt(100)
    ask(engine, in_four_steps(prompt))
    for place in (15, 31, 63, 95, 96, 99):
        other = (*prompt[:place], prompt[place] + 1, *prompt[place + 1 :])
        case = in_four_steps(other)
        expected = expect(case, model.oracle, engine)
        asked = ask(engine, case)
        found = place // PAGE * PAGE
        assert (asked.first, asked.cached) == ((found, 112), found)
        assert_same_tokens([asked.tokens], [expected])


@pytest.mark.parametrize("how", fast("preempted", of=("preempted", "aborted")))
def test_pages_of_a_request_that_left_inside_a_block(
    model: BlockEngines, engine: Engine, how: str
):
    """Another begins with its prompt and the tokens it had handed out."""
    first = in_four_steps(make_prompt(40), 50)
    forwards_of_first = expect(first, model.oracle, engine).forwards
    for steps in range(1, forwards_of_first, 2):
        assert engine.llm.reset_prefix_cache()
        name = engine.add(first.prompt, first.params())
        with recording(engine) as forwards:
            for _ in range(steps):
                engine.step()
        (request,) = engine.scheduler.running
        text = tuple(request.all_token_ids)
        # What was final when the last forward was scheduled.
        last = forwards[-1][name]
        final = last.end - (BLOCK if last.canvas != 1 else 0)
        if how == "preempted":
            engine.preempt(request.request_id)
        engine.abort(name)
        second = in_four_steps((*text, *make_prompt(130 - len(text))))
        expected = expect(second, model.oracle, engine)
        asked = ask(engine, second)
        assert asked.cached == final // PAGE * PAGE
        assert_same_tokens([asked.tokens], [expected])


def test_without_prefix_caching_all_is_computed(model: BlockEngines):
    engine = model(enable_prefix_caching=False)
    case = in_four_steps(make_prompt(100))
    expected = expect(case, model.oracle, engine)
    for asked in (ask(engine, case), ask(engine, case)):
        assert (asked.first, asked.cached) == ((0, 112), 0)
        assert_same_tokens([asked.tokens], [expected])


def test_blocks_counted_from_the_prompt_are_not_shared(
    engines: Callable[..., Engine], tmp_path_factory
):
    """What a token sees depends on the length of its prompt: nothing is looked up."""
    name = "Qwen3-0.6B-diffusion-bd3lm-v0.1"
    model = BlockEngines(engines, tmp_path_factory.getbasetemp(), name)
    engine = model()
    assert not engine.scheduler.kv_cache_manager.enable_caching
    cases = [in_four_steps(make_prompt(96) + make_prompt(n)) for n in (4, 4, 7)]
    wanted = [expect(case, model.oracle, engine) for case in cases]
    asked = [ask(engine, case) for case in cases]
    assert [one.first for one in asked] == [(0, 116), (0, 116), (0, 119)]
    assert_same_tokens([one.tokens for one in asked], wanted)


# -- many at once -----------------------------------------------------------------


def conversations(seed: int, count: int) -> list[BlockCase]:
    """First turns; a few openings, of which more or less is used."""
    source = random.Random(seed)
    openings = [make_prompt(120, opening) for opening in range(3)]
    cases = []
    for number in range(count):
        shared = source.choice(openings)[: source.choice((16, 31, 32, 64, 96, 120))]
        prompt = shared + make_prompt(source.randint(1, 20), number)
        cases.append(
            BlockCase(
                prompt,
                source.randint(1, 40),
                source.choice([*RULES]),
                steps_per_block=source.choice([None, 3]),
                ignore_eos=source.random() < 0.5,
            )
        )
    return cases


def next_turn(case: BlockCase, tokens: list[int], seed: int) -> BlockCase:
    source = random.Random(seed)
    more = make_prompt(source.randint(1, 30), seed)
    return BlockCase((*case.prompt, *tokens, *more), source.randint(1, 40), "threshold")


def converse(model: BlockEngines, engine: Engine, cases: list[BlockCase]) -> None:
    """Two turns each, all at once, against the oracle."""
    for turn in range(2):
        wanted: list[Expected] = [expect(c, model.oracle, engine) for c in cases]
        ids = [engine.add(case.prompt, case.params()) for case in cases]
        done = drive(engine, lambda _: assert_only_final_pages_are_published(engine))
        tokens = [done[i].tokens for i in ids]
        assert_same_tokens(tokens, wanted)
        cases = [
            next_turn(case, said, seed=100 * turn + number)
            for number, (case, said) in enumerate(zip(cases, tokens, strict=True))
        ]


def test_conversations_in_little_memory(model: BlockEngines):
    """19 pages: they are taken from texts that may be asked for again."""
    engine = model(max_num_batched_tokens=4 * BLOCK, num_gpu_blocks_override=20)
    converse(model, engine, conversations(0, 10))


@pytest.mark.slow
@pytest.mark.parametrize(("block", "pages"), [(4, 80), (16, 20), (32, 20), (32, 80)])
def test_many_conversations(model: BlockEngines, block: int, pages: int):
    engine = model(
        max_num_batched_tokens=4 * 32,
        num_gpu_blocks_override=pages,
        dlm={"block_length": block},
    )
    converse(model, engine, conversations(1, 60))


def test_sharing_changes_nothing(model: BlockEngines):
    cases = conversations(3, 8)
    got = [run(model(enable_prefix_caching=on), cases) for on in (False, True)]
    assert_equal(cases, got[1], [expect(case, model.oracle, model()) for case in cases])
    assert got[0] == got[1]
