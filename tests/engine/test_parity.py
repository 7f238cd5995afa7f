# SPDX-License-Identifier: Apache-2.0
"""The engine against the oracle: the same tokens in the same number of forwards."""

from __future__ import annotations

import itertools
import random

import pytest
from engine.cases import (
    RULES,
    Case,
    assert_equal,
    expect,
    make_prompt,
    run_cases,
)
from engine.harness import Engine
from reference.llada import TinyLLaDA
from reference.procedures import CACHES
from tiers import fast

BLOCKS = (8, 16, 32)
LENGTHS = range(1, 71)


def make_case(
    rule: str, cache: str, block: int, length: int, fewer_steps: bool, number: int
) -> Case:
    """One combination; `number` varies what the combination leaves open."""
    # Whole canvases and cut ones, of one to four blocks.
    max_tokens = block * (1 + number % 3) - (number % 4) * (number % 2)
    blocks = -(-max_tokens // block)
    # Learn2PD's oracle writes a fixed number per step: its steps divide the block.
    per_block = 3 if rule.startswith("static") else block // 4
    return Case(
        make_prompt(length, seed=number),
        rule=rule,
        cache=cache,
        block=block,
        max_tokens=max_tokens,
        steps=per_block * blocks if fewer_steps else None,
        ignore_eos=number % 3 == 0,
        seed=number,
    )


def all_cases(cache: str, block: int) -> list[Case]:
    """Every rule with a third of the lengths, which is another one for each block.

    Half of them have fewer steps.
    """
    lengths = LENGTHS[BLOCKS.index(block) :: len(BLOCKS)]
    return [
        make_case(rule, cache, block, length, length % 4 < 2, number)
        for number, (rule, length) in enumerate(itertools.product(RULES, lengths))
    ]


def sample_cases(cache: str, block: int) -> list[Case]:
    """Every rule, with or without fewer steps, a prompt length drawn for each."""
    source = random.Random(f"{cache}:{block}")
    combinations = itertools.product(RULES, (False, True))
    both = [
        make_case(rule, cache, block, source.choice(LENGTHS), fewer_steps, number)
        for number, (rule, fewer_steps) in enumerate(combinations)
    ]
    return [case for number, case in enumerate(both) if number % 4 in (0, 3)]


def check(engine: Engine, oracle: TinyLLaDA, cases: list[Case], solo: int) -> None:
    """All cases eight at a time, and `solo` of them again, one at a time."""
    wanted = [expect(case, oracle) for case in cases]
    assert_equal(cases, run_cases(engine, cases), wanted)
    alone = random.Random(0).sample(range(len(cases)), solo)
    cases = [cases[i] for i in alone]
    got = [run_cases(engine, [case])[0] for case in cases]
    assert_equal(cases, got, [wanted[i] for i in alone])


CELLS = [*itertools.product(CACHES, BLOCKS)]


@pytest.mark.parametrize(
    ("cache", "block"), fast(*zip(CACHES, BLOCKS, strict=True), of=CELLS)
)
def test_parity(engine: Engine, oracle: TinyLLaDA, cache: str, block: int):
    check(engine, oracle, sample_cases(cache, block), solo=3)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("cache", CACHES)
def test_parity_of_all_lengths(
    engine: Engine, oracle: TinyLLaDA, cache: str, block: int
):
    check(engine, oracle, all_cases(cache, block), solo=20)
