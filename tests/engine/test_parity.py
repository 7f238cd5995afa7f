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


def sample_cases(cache: str, block: int, share: int) -> list[Case]:
    """One rule in `share`, others for each cache, with or without fewer steps.

    A prompt length is drawn for each.
    """
    source = random.Random(f"{cache}:{block}")
    combinations = itertools.product(RULES, (False, True))
    both = [
        make_case(rule, cache, block, source.choice(LENGTHS), fewer_steps, number)
        for number, (rule, fewer_steps) in enumerate(combinations)
    ]
    every = [case for number, case in enumerate(both) if number % 4 in (0, 3)]
    return every[CACHES.index(cache) % share :: share]


def check(engine: Engine, oracle: TinyLLaDA, cases: list[Case], solo: int) -> None:
    """All cases eight at a time, and `solo` of them again, one at a time."""
    wanted = [expect(case, oracle) for case in cases]
    assert_equal(cases, run_cases(engine, cases), wanted)
    alone = random.Random(0).sample(range(len(cases)), solo)
    cases = [cases[i] for i in alone]
    got = [run_cases(engine, [case])[0] for case in cases]
    assert_equal(cases, got, [wanted[i] for i in alone])


QUICK = [(*cell, len(CACHES)) for cell in zip(CACHES, BLOCKS, strict=True)]
"""Every rule once, with one of the caches."""
CELLS = [(*cell, 1) for cell in itertools.product(CACHES, BLOCKS)]


@pytest.mark.parametrize(("cache", "block", "share"), fast(*QUICK, of=[*QUICK, *CELLS]))
def test_parity(engine: Engine, oracle: TinyLLaDA, cache: str, block: int, share: int):
    check(engine, oracle, sample_cases(cache, block, share), solo=2)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("cache", CACHES)
def test_parity_of_all_lengths(
    engine: Engine, oracle: TinyLLaDA, cache: str, block: int
):
    check(engine, oracle, all_cases(cache, block), solo=20)
