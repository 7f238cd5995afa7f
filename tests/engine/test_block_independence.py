# SPDX-License-Identifier: Apache-2.0
"""Block-causal requests that join, leave and are preempted at any step."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from engine.block_cases import RULES, BlockCase, expect
from engine.block_engines import (
    BLOCK,
    BlockEngines,
    assert_only_final_pages_are_published,
)
from engine.cases import Expected, assert_same_tokens, make_prompt
from engine.harness import Engine, drive
from engine.test_independence import stores
from tiers import fast

MODELS = ("SDAR-4B-Chat-b16", "Fast_dLLM_v2_7B")


@pytest.fixture(params=fast(MODELS[1], of=MODELS), scope="module")
def model(
    engines: Callable[..., Engine], tmp_path_factory, request: pytest.FixtureRequest
) -> BlockEngines:
    """Each kind of model in turn; the second one's blocks begin with a seed."""
    return BlockEngines(engines, tmp_path_factory.getbasetemp(), request.param)


CASES = [
    BlockCase(
        make_prompt(1 + 13 * number % 90, number),
        max_tokens=20 + 7 * number % 41,
        rule=list(RULES)[number % len(RULES)],
        steps_per_block=(None, 5, 8)[number % 3],
        ignore_eos=number % 2 == 0,
    )
    for number in range(10)
]


@pytest.fixture(scope="module")
def engine(model: BlockEngines) -> Engine:
    """A prompt of more than 64 tokens is computed in chunks."""
    return model(max_num_batched_tokens=4 * BLOCK)


@pytest.fixture(scope="module")
def wanted(model: BlockEngines, engine: Engine) -> list[Expected]:
    return [expect(case, model.oracle, engine) for case in CASES]


def test_requests_join_while_others_decode(engine: Engine, wanted: list[Expected]):
    ids = [engine.add(CASES[0].prompt, CASES[0].params())]

    def join(step: int) -> None:
        assert_only_final_pages_are_published(engine)
        if step % 3 == 0 and len(ids) < len(CASES):
            case = CASES[len(ids)]
            ids.append(engine.add(case.prompt, case.params()))

    done = drive(engine, join)
    assert_same_tokens([done[i].tokens for i in ids], wanted)


def test_neighbours_are_preempted_and_aborted(engine: Engine, wanted: list[Expected]):
    source = random.Random(6)
    ids, victims = [], []
    for case in CASES:
        ids.append(engine.add(case.prompt, case.params()))
        other = source.choice(CASES)
        victims.append(engine.add(other.prompt, other.params()))
    unharmed = list(victims)
    hit = 0

    def meddle(step: int) -> None:
        nonlocal hit
        assert_only_final_pages_are_published(engine)
        running = [r for r in engine.scheduler.running if r.num_preemptions < 2]
        if step % 3 == 1 and running:
            engine.preempt(source.choice(running).request_id)
            hit += 1
        if step % 4 == 2 and unharmed:
            engine.abort(unharmed.pop(source.randrange(len(unharmed))))

    done = drive(engine, meddle)
    assert hit >= 10
    assert set(victims) - set(done)
    assert_same_tokens([done[i].tokens for i in ids], wanted)


FAST = [(True, 32, "threshold")]
"""Whether its pages may be found again, a prompt's length, and a rule."""

EVERY_STEP = [
    pytest.param(
        *one,
        id="{}-{}-{}".format("found" if one[0] else "recomputed", *one[1:]),
        marks=() if one in FAST else pytest.mark.slow,
    )
    for one in itertools.product(
        (False, True), (3, 20, 32), ("sequential", "threshold", "static")
    )
]


@pytest.mark.parametrize(("found", "length", "rule"), EVERY_STEP)
def test_preempted_after_every_step(
    model: BlockEngines, engine: Engine, found: bool, length: int, rule: str
):
    """Also right behind a seed; its own pages may be found again, or not."""
    case = BlockCase(
        make_prompt(length, 4),
        24,
        rule,
        steps_per_block=8 if rule == "static" else None,
        ignore_eos=True,
    )
    expected = expect(case, model.oracle, engine)
    for chosen in range(expected.forwards - 1):
        engine.add(case.prompt, case.params())

        def meddle(step: int, chosen: int = chosen) -> None:
            if step == chosen:
                (request,) = engine.scheduler.running
                engine.preempt(request.request_id)
                if not found:
                    assert engine.llm.reset_prefix_cache()

        (result,) = drive(engine, meddle).values()
        assert_same_tokens([result.tokens], [expected])


def test_aborted_after_any_step_leaves_nothing(engine: Engine):
    """Prompts in chunks, open blocks, blocks about to be seeded."""
    engine.flush()
    pages = engine.free_pages
    for case in (CASES[5], BlockCase(make_prompt(96), 20, "static", 4)):
        for chosen in range(0, 12, 2):
            name = engine.add(case.prompt, case.params())
            for _ in range(chosen):
                engine.step()
            engine.abort(name)
            engine.flush()
            assert {key: size for key, size in stores(engine) if size} == {}
            assert engine.free_pages == pages


def test_memory_runs_out(model: BlockEngines):
    """11 pages for texts that begin with one and grow to four: nobody notices."""
    engine = model(max_num_batched_tokens=4 * BLOCK, num_gpu_blocks_override=12)
    cases = [
        BlockCase(
            make_prompt(1 + number, number),
            80 + number,
            "static",
            steps_per_block=6,
            ignore_eos=True,
        )
        for number in range(8)
    ]
    wanted = [expect(case, model.oracle, engine) for case in cases]

    def watch(step: int) -> None:
        assert_only_final_pages_are_published(engine)

    outputs, preempted = engine.run_short_of_pages(
        [case.prompt for case in cases], [case.params() for case in cases], watch
    )
    assert len(preempted) >= 2
    assert_same_tokens([output.outputs[0].token_ids for output in outputs], wanted)


@pytest.mark.parametrize("model", ["SDAR-4B-Chat-b16"], indirect=True)
def test_preempted_in_the_step_that_was_to_make_a_page_final(model: BlockEngines):
    """5 pages; both texts need a third one in the same step, the second has priority.

    The first was scheduled by then: rows of its page [32, 64) are not computed, and
    must not be found when it returns.
    """
    engine = model(
        max_model_len=128, num_gpu_blocks_override=6, scheduling_policy="priority"
    )
    cases = [
        BlockCase(make_prompt(length), most, "static", 2, ignore_eos=True)
        for length, most in ((34, 40), (41, 30))
    ]
    wanted = [expect(case, model.oracle, engine) for case in cases]
    preempted = set()

    def watch(step: int) -> None:
        preempted.update(r.num_preemptions for r in engine.scheduler.waiting)

    ids = []
    for case, priority in zip(cases, (1, 0), strict=True):
        ids.append(engine.add(case.prompt, case.params()))
        (request,) = engine.scheduler.waiting
        request.priority = priority
        engine.step()
    done = drive(engine, watch)
    assert preempted == {1}
    assert_same_tokens([done[i].tokens for i in ids], wanted)


def test_all_preempted_together(engine: Engine, wanted: list[Expected]):
    ids = [engine.add(case.prompt, case.params()) for case in CASES]

    def reset(step: int) -> None:
        if step % 30 == 11:
            assert engine.llm.reset_prefix_cache(reset_running_requests=True)

    done = drive(engine, reset)
    assert_same_tokens([done[i].tokens for i in ids], wanted)
