# SPDX-License-Identifier: Apache-2.0
"""Several blocks of a block-causal model decided together, against the oracle.

With full attention `multi_block` is one of the rules of `cases.py`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from engine.block_engines import (
    BLOCK,
    BlockEngines,
    assert_only_final_pages_are_published,
    recording,
    rows_of,
)
from engine.cases import (
    Expected,
    assert_equal,
    assert_same_tokens,
    is_near_tie,
    make_prompt,
)
from engine.harness import Engine, Finished, drive, params
from reference.block_procedures import generate_blocks
from reference.network import TinyModel
from reference.place_rules import multi_block
from reference.rules import Rule, View
from vllm.exceptions import VLLMValidationError

MODES: list[dict[str, Any]] = [
    {"threshold": 1.5, "open_at": 0.2, "due_at": 0.6},
    {"by": "confidence", "threshold": 0.4, "open_at": 0.4, "push": "each"},
    {"threshold": 2.5, "open_at": 0.05},
]


@dataclass(frozen=True)
class Together:
    """One request."""

    prompt: tuple[int, ...]
    max_tokens: int
    blocks: int = 2
    mode: int = 0
    ignore_eos: bool = False
    cut_at_end: bool = False

    def params(self) -> Any:
        dlm = {
            "strategy": "multi_block",
            "strategy_config": MODES[self.mode] | {"cut_at_end": self.cut_at_end},
            "block_length": self.blocks * BLOCK,
        }
        return params(self.max_tokens, dlm=dlm, ignore_eos=self.ignore_eos)


def expect(case: Together, model: TinyModel, engine: Engine) -> Expected:
    def decode(watch: Callable[[Rule, View, list[int]], None] | None = None):
        rule = multi_block(block=BLOCK, **MODES[case.mode])
        return generate_blocks(
            model,
            list(case.prompt),
            max_tokens=case.max_tokens,
            block_length=BLOCK,
            together=case.blocks,
            rule=rule,
            max_model_len=engine.scheduler.max_model_len,
            eos_stop=not case.ignore_eos,
            eos_cuts=case.cut_at_end and not case.ignore_eos,
            observe=None if watch is None else partial(watch, rule),
        )

    def look_for_ties() -> bool:
        found: list[bool] = []
        decode(lambda *step: found.append(is_near_tie(*step)))
        return any(found)

    result = decode()
    return Expected(
        result.tokens, result.forwards, result.step_of_position, look_for_ties
    )


def run(engine: Engine, cases: list[Together]) -> list[Finished]:
    return engine.run([c.prompt for c in cases], [c.params() for c in cases])


def make_cases(count: int) -> list[Together]:
    source = random.Random(3)
    return [
        Together(
            make_prompt(1 + 5 * number % 67, number),
            source.randint(1, 110),
            blocks=(2, 4, 3)[number % 3],
            mode=number % len(MODES),
            ignore_eos=number % 4 == 0,
            cut_at_end=number % 2 == 0,
        )
        for number in range(count)
    ]


CASES = make_cases(18)


@pytest.fixture(scope="module")
def sdar(engines: Callable[..., Engine], tmp_path_factory) -> BlockEngines:
    return BlockEngines(engines, tmp_path_factory.getbasetemp(), "SDAR-4B-Chat-b16")


@pytest.fixture(scope="module")
def engine(sdar: BlockEngines) -> Engine:
    return sdar()


@pytest.fixture(scope="module")
def wanted(sdar: BlockEngines, engine: Engine) -> list[Expected]:
    return [expect(case, sdar.oracle, engine) for case in CASES]


def test_equal_the_oracle_in_a_batch_and_alone(engine: Engine, wanted: list[Expected]):
    assert_equal(CASES, run(engine, CASES), wanted)
    for number in range(0, len(CASES), 5):
        alone = run(engine, CASES[number : number + 1])
        assert_equal(CASES[number : number + 1], alone, wanted[number : number + 1])


def test_several_blocks_are_written_in_one_step(wanted: list[Expected]):
    ahead = 0
    for case, expected in zip(CASES, wanted, strict=True):
        blocks = defaultdict(set)
        for place, step in enumerate(expected.written_at):
            blocks[step].add((len(case.prompt) + place) // BLOCK)
        ahead += max(map(len, blocks.values())) > 1
    assert ahead >= len(CASES) // 3


def test_rows_of_every_forward(engine: Engine):
    """Spans begin with the block in which the prompt ends; the last one is cut."""
    case = Together(make_prompt(40), 70, blocks=2, mode=0, ignore_eos=True)
    assert engine.llm.reset_prefix_cache()
    with recording(engine) as forwards:
        request_id = engine.add(case.prompt, case.params())
        drive(engine, lambda step: None)
    rows = rows_of(forwards, request_id)
    ends = sorted({end for _, end in rows})
    # The text ends at 110, in the block that ends at 112.
    assert ends == [64, 96, 112]
    assert rows[0] == (0, 64)
    assert {start for start, end in rows if end == 96} == {32, 64}
    assert {start for start, end in rows if end == 112} <= {64, 96}


def test_preempted_and_found_again(engine: Engine, wanted: list[Expected]):
    """What a replayed span wrote before is not looked for in pages of others."""
    ids = [engine.add(case.prompt, case.params()) for case in CASES]
    source, hit = random.Random(6), 0

    def meddle(step: int) -> None:
        nonlocal hit
        assert_only_final_pages_are_published(engine)
        running = [r for r in engine.scheduler.running if r.num_preemptions < 3]
        if running:
            engine.preempt(source.choice(running).request_id)
            hit += 1

    done = drive(engine, meddle)
    assert hit >= 12
    assert_same_tokens([done[i].tokens for i in ids], wanted)


def test_a_turn_that_others_have_published(sdar: BlockEngines, engine: Engine):
    """The replay of a span whose very text is another request's prompt, in pages."""
    case = Together(make_prompt(20, 9), 100, blocks=4, mode=0, ignore_eos=True)
    expected = expect(case, sdar.oracle, engine)
    assert engine.llm.reset_prefix_cache()
    whole = (*case.prompt, *expected.tokens)
    engine.run([whole], [Together(whole, 1).params()])
    for chosen in range(2, expected.forwards - 1, 3):
        engine.add(case.prompt, case.params())

        def meddle(step: int, chosen: int = chosen) -> None:
            if step == chosen:
                (request,) = engine.scheduler.running
                engine.preempt(request.request_id)

        (done,) = drive(engine, meddle).values()
        assert_same_tokens([done.tokens], [expected])


def test_chunked_prompts(sdar: BlockEngines):
    engine = sdar(max_num_batched_tokens=5 * BLOCK - 3)
    cases = [Together(make_prompt(n, n), 40, mode=n % 3) for n in (70, 121, 150)]
    wanted = [expect(case, sdar.oracle, engine) for case in cases]
    got = run(engine, cases)
    assert_same_tokens([one.tokens for one in got], wanted)
    with pytest.raises(VLLMValidationError, match="ask for at most 38"):
        run(engine, [Together(make_prompt(5), 40, blocks=3)])


@pytest.mark.parametrize(
    ("dlm", "said"),
    [
        ({"block_length": 24}, "a multiple of 16"),
        ({"block_length": "canvas"}, "a multiple of 16"),
        ({"cache": "dual"}, "leave it at 'none'"),
        ({"sub_block_length": 8}, "leave it out"),
        ({"strategy_config": {"block": 8}}, "blocks have 16 positions"),
        ({"tccf": {"trigger": [1], "check": [2]}}, "leave one of them out"),
    ],
)
def test_refused(engine: Engine, dlm: dict[str, Any], said: str):
    with pytest.raises(VLLMValidationError, match=said):
        engine.run([make_prompt(5)], [params(8, dlm={"strategy": "multi_block"} | dlm)])


@pytest.mark.parametrize("name", ["Fast_dLLM_v2_7B", "Nemotron-Labs-Diffusion-3B"])
def test_refused_where_a_finished_block_begins_the_next(
    engines: Callable[..., Engine], tmp_path_factory, name: str
):
    engine = BlockEngines(engines, tmp_path_factory.getbasetemp(), name)()
    with pytest.raises(
        VLLMValidationError, match="only when the one before is finished"
    ):
        engine.run([make_prompt(5)], [params(8, dlm={"strategy": "multi_block"})])
