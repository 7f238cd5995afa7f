# SPDX-License-Identifier: Apache-2.0
"""A canvas from the request: the engine against the oracle, strategies x caches."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from engine import block_cases
from engine.block_cases import BlockCase
from engine.block_engines import BlockEngines
from engine.cases import (
    MASK_ID,
    RULES,
    Case,
    assert_equal,
    expect,
    make_prompt,
    run_cases,
)
from engine.harness import Engine, Finished, drive
from engine.page_ledger import watching
from reference.cached_procedures import ALL_CACHES
from reference.llada import TinyLLaDA
from tiers import fast

Canvas = tuple[int | None, ...]

NOT_COMPARED = ("static/random", "joint/penalty")
"""The oracle's noise is numbered by steps of blocks full of masks, and its penalty does
not know that some tokens may not be written."""

FILLING = tuple(rule for rule in RULES if rule not in NOT_COMPARED)

KINDS = ("scattered", "runs", "head", "tail", "gap")


def make_canvas(width: int, kind: str, seed: int = 0) -> Canvas:
    """A canvas with masks (None) and ordinary words.

    "runs" has written runs that are longer than a block of 8 or 16; "head" and "tail"
    begin or end with one, "gap" does both.
    """
    source = random.Random(f"{width}:{kind}:{seed}")
    words = [source.randrange(110) for _ in range(width)]
    if kind == "scattered":
        is_hole = [source.random() < 0.6 for _ in range(width)]
    elif kind == "runs":
        lengths = [source.randrange(1, 26) for _ in range(width)]
        is_hole = [i % 2 == 0 for i, n in enumerate(lengths) for _ in range(n)][:width]
    else:
        cut = source.randrange(width // 3, width // 2)
        head = cut if kind in ("head", "gap") else 0
        tail = width - cut // 2 if kind in ("tail", "gap") else width
        is_hole = [head <= i < tail for i in range(width)]
    is_hole[source.randrange(width)] = True
    return tuple(
        None if hole else word for hole, word in zip(is_hole, words, strict=True)
    )


def make_cases(cache: str, rules: Sequence[str] = FILLING) -> list[Case]:
    cases = []
    for number, rule in enumerate(rules):
        width = (33, 48, 40, 61, 24)[number % 5]
        canvas = make_canvas(width, KINDS[number % len(KINDS)], number)
        block = (8, 16, 12, 32)[number % 4]
        cases.append(
            Case(
                make_prompt(3 + number, number),
                rule=rule,
                cache=cache,
                # A filter is for its block length.
                block=block,
                max_tokens=width,
                # Learn2PD's oracle counts on blocks full of masks.
                steps=None
                if number % 2 or rule.startswith("learn2pd")
                else -(-width // block) * 4,
                ignore_eos=number % 4 == 3,
                seed=number,
                canvas=canvas,
            )
        )
    return cases


def assert_pinned(cases: Sequence[Case], got: Sequence[Finished]) -> None:
    for case, result in zip(cases, got, strict=True):
        assert case.canvas is not None
        for token, given in zip(result.tokens, case.canvas, strict=False):
            assert given is None or token == given


@pytest.mark.parametrize(
    ("cache", "every"),
    [
        ("dual", 4),
        pytest.param("window", 4, marks=pytest.mark.slow),
        *(pytest.param(cache, 1, marks=pytest.mark.slow) for cache in ALL_CACHES),
    ],
)
def test_every_strategy_fills_the_holes(
    engine: Engine, oracle: TinyLLaDA, cache: str, every: int
):
    cases = make_cases(cache)[::every]
    wanted = [expect(case, oracle) for case in cases]
    got = run_cases(engine, cases)
    assert_pinned(cases, got)
    assert_equal(cases, got, wanted, near_ties=2)


def test_alone_as_in_a_batch_and_after_preemptions(engine: Engine):
    """Each of them, with the cache policies by turns."""
    cases = [
        replace(case, cache=ALL_CACHES[number % len(ALL_CACHES)])
        for number, case in enumerate(make_cases("none"))
        if number % 7 == 0
    ]
    together = run_cases(engine, cases)
    alone = [run_cases(engine, [case])[0] for case in cases[::2]]
    assert [one.tokens for one in alone] == [one.tokens for one in together[::2]]
    assert [one.forwards for one in alone] == [one.forwards for one in together[::2]]

    names = [engine.add(case.prompt, case.params()) for case in cases[:8]]

    done = drive(engine, preempting(engine))
    again = [done[name].tokens for name in names]
    assert again == [one.tokens for one in together[:8]]


def test_a_canvas_without_masks_but_one_takes_one_forward(engine: Engine):
    canvas = list(make_canvas(60, "head", 1))
    canvas = [5 if token is None else token for token in canvas]
    canvas[37] = None
    case = Case(make_prompt(9), block=8, max_tokens=60, canvas=tuple(canvas))
    (result,) = run_cases(engine, [case])
    assert result.forwards == 1
    assert len(result.tokens) == 60
    assert result.output.finish_reason == "length"
    assert_pinned([case], [result])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "joint", "pinned": False},
        *(
            {"strategy": name}
            for name in ("lopa", "freedave", "dream", "diffucoder", "klass")
        ),
    ],
    ids=lambda options: options["strategy"],
)
def test_strategies_without_an_oracle_here(engine: Engine, options: dict[str, Any]):
    """The same alone, together, and after preemptions; pins stay."""
    check_without_oracle(engine, {"block_length": 16, **options}, MASK_ID)


def check_without_oracle(engine: Engine, options: dict[str, Any], mask_id: int) -> None:
    """Sampled texts: the same alone, together, and after preemptions; pins stay."""
    cases = [
        BlockCase(
            make_prompt(4 + number, number),
            45 + number,
            canvas=make_canvas(45 + number, kind, number),
            mask_id=mask_id,
        )
        for number, kind in enumerate(KINDS)
    ]
    sampling = [
        case.params(temperature=0.7, seed=number) for number, case in enumerate(cases)
    ]
    for one in sampling:
        one.extra_args = {"dlm": {"canvas": one.extra_args["dlm"]["canvas"], **options}}
    together = engine.run([case.prompt for case in cases], sampling)
    if options.get("pinned", True):
        assert_pinned(cases, together)
    alone = [
        engine.run([case.prompt], [one])[0]
        for case, one in zip(cases, sampling, strict=True)
    ]
    assert [one.tokens for one in alone] == [one.tokens for one in together]

    names = [
        engine.add(case.prompt, one) for case, one in zip(cases, sampling, strict=True)
    ]
    done = drive(engine, preempting(engine))
    assert [done[name].tokens for name in names] == [one.tokens for one in together]


def preempting(engine: Engine) -> Callable[[int], None]:
    """What to do between steps, so that requests lose their pages now and then."""

    def meddle(step: int) -> None:
        running = [one.request_id for one in engine.scheduler.running]
        if step % 3 == 1 and step < 30 and running:
            engine.preempt(running[step % len(running)])

    return meddle


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SDAR-4B-Chat-b16", {"strategy": "multi_block", "block_length": 48}),
        pytest.param(
            "SDAR-4B-Chat-b16",
            {"strategy": "freedave", "strategy_config": {"drafts": 4}},
            marks=pytest.mark.slow,
        ),
        pytest.param("SDAR-4B-Chat-b16", {"strategy": "lopa"}, marks=pytest.mark.slow),
        pytest.param("Fast_dLLM_v2_7B", {"cache": "dual"}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_options_of_block_models(
    engines: Callable[..., Engine], tmp_path_factory, name: str, options: dict[str, Any]
):
    engine = BlockEngines(engines, tmp_path_factory.getbasetemp(), name)()
    mask_id = engine.scheduler.dlm_defaults.mask_token_id
    check_without_oracle(engine, options, mask_id)


BLOCK_MODELS = (
    "SDAR-4B-Chat-b16",
    "Fast_dLLM_v2_7B",
    "Nemotron-Labs-Diffusion-3B",
    "Qwen3-0.6B-diffusion-bd3lm-v0.1",
)


@pytest.fixture(
    params=[
        BLOCK_MODELS[1],
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in BLOCK_MODELS
            if name != BLOCK_MODELS[1]
        ),
    ],
    scope="module",
)
def blocks(
    engines: Callable[..., Engine], tmp_path_factory, request: pytest.FixtureRequest
) -> BlockEngines:
    return BlockEngines(engines, tmp_path_factory.getbasetemp(), request.param)


def block_requests(mask_id: int, every: int) -> list[BlockCase]:
    """One in `every` of all rules with all kinds of canvases."""
    cases = []
    rules = [rule for rule in block_cases.RULES if rule not in NOT_COMPARED]
    for number, rule in enumerate(rules):
        for kind in KINDS:
            width = (37, 64, 90, 53)[len(cases) % 4]
            cases.append(
                BlockCase(
                    make_prompt(2 + 3 * len(cases) % 40, len(cases)),
                    width,
                    rule=rule,
                    ignore_eos=number % 3 == 2,
                    canvas=make_canvas(width, kind, len(cases)),
                    mask_id=mask_id,
                )
            )
    return cases[::every]


@pytest.mark.parametrize("every", fast(3, of=(3, 1)))
def test_block_models_fill_holes_anywhere(blocks: BlockEngines, every: int):
    """Whole blocks of pins, leads that are pins, and pins to the right."""
    engine = blocks()
    cases = block_requests(engine.scheduler.dlm_defaults.mask_token_id, every)
    wanted = [block_cases.expect(case, blocks.oracle, engine) for case in cases]
    with watching(engine):
        got = block_cases.run(engine, cases)
    assert_pinned(cases, got)
    assert_equal(cases, got, wanted, near_ties=1)

    some = cases[::4]
    names = [engine.add(case.prompt, case.params()) for case in some]

    done = drive(engine, preempting(engine))
    assert [done[n].tokens for n in names] == [one.tokens for one in got[::4]]
