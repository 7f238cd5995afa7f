# SPDX-License-Identifier: Apache-2.0
"""The canvas: cut, continued, limited by the context, and the mask id in odd places."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.cases import (
    RULES,
    Case,
    assert_equal,
    expect,
    make_prompt,
    run_cases,
)
from engine.harness import Engine, params
from reference import procedures
from reference.llada import TinyLLaDA
from reference.procedures import CACHES, Rule, View, generate
from tiers import fast


def test_the_end_of_text_may_stand_in_the_config(
    engines: Callable[..., Engine], engine: Engine, checkpoint: Path
):
    """vLLM itself asks the tokenizer and generation_config.json only."""
    whole = engine.run([make_prompt(4)], params(24, ignore_eos=True))[0].tokens
    end = whole[6]
    own = engines(model=str(checkpoint), hf_overrides={"eos_token_id": end})
    (result,) = own.run([make_prompt(4)], params(24))
    assert result.tokens[-1] == end
    assert result.tokens == whole[: whole.index(end) + 1]
    assert result.output.finish_reason == "stop"
    (result,) = own.run([make_prompt(4)], params(24, ignore_eos=True))
    assert result.tokens == whole


@pytest.mark.parametrize(
    ("cache", "every"),
    fast(("none", 7), of=[("none", 7), *itertools.product(CACHES, (1,))]),
)
def test_outputs_longer_than_a_canvas_continue_on_another(
    small_engine: Engine, oracle: TinyLLaDA, cache: str, every: int
):
    cases = [
        Case(
            make_prompt(5 + number, number),
            rule=rule,
            cache=cache,
            # Canvases of 32, of 32, and of 24: max_canvas in whole blocks.
            block=(8, 16, 12)[number % 3],
            max_tokens=(70, 64, 41)[number % 3],
            # Two blocks of 16, four of 8 or two of 12, a quarter of a block at a time.
            steps=None if number % 2 else (8, 8, 6)[number % 3],
            ignore_eos=number % 4 == 0 or not rule.startswith("learn2pd"),
            seed=number,
        )
        for number, rule in list(enumerate(RULES))[::every]
    ]
    wanted = [expect(case, oracle, max_canvas=32) for case in cases]
    got = []
    for i in range(0, len(cases), 3):  # as many as have room: a replay takes forwards
        got += run_cases(small_engine, cases[i : i + 3])
    assert_equal(cases, got, wanted)
    assert sum(len(expected.tokens) > 32 for expected in wanted) >= len(cases) // 6


@pytest.mark.parametrize("cache", fast("none", of=CACHES))
def test_canvas_is_cut_at_the_context_length(
    small_engine: Engine, oracle: TinyLLaDA, cache: str
):
    """128 positions; a last block shorter than the block length."""
    lengths = range(97, 128, 5)
    cases = [
        Case(
            make_prompt(length),
            rule=("static/low_confidence", "threshold", "factor")[length % 3],
            cache=cache,
            block=128 - length,
            max_tokens=128 - length,
            ignore_eos=True,
        )
        for length in lengths
    ]
    wanted = [expect(case, oracle, max_canvas=32) for case in cases]
    got = run_cases(small_engine, [replace(case, block=32) for case in cases])
    assert_equal(cases, got, wanted)


def first_blocks_first(rule: Rule, block: int) -> Rule:
    """A rule on one long block that acts as on blocks of `block`, left to right."""

    def select(view: View) -> list[int]:
        start = min(view.masked_offsets()) // block * block
        ahead = torch.arange(len(view.masked)) >= start + block
        return rule.select(replace(view, masked=view.masked & ~ahead))

    return Rule(select, rule.ends_by_schedule)


@pytest.mark.slow
def test_last_of_several_blocks_is_cut_at_the_context_length(
    small_engine: Engine, oracle: TinyLLaDA
):
    """Exact cache: only which positions may be written tells blocks apart."""
    cases = [
        Case(
            make_prompt(length), rule, block=8, max_tokens=128 - length, ignore_eos=True
        )
        for length in (98, 101, 106, 111)
        for rule in ("static/low_confidence", "threshold", "factor")
    ]
    got = run_cases(small_engine, cases)
    for case, result in zip(cases, got, strict=True):
        rule = {
            "static": procedures.static(),
            "threshold": procedures.threshold(0.9),
            "factor": procedures.factor(1.0),
        }[case.rule.partition("/")[0]]
        reference = generate(
            oracle,
            list(case.prompt),
            gen_length=case.max_tokens,
            block_length=case.max_tokens,
            rule=first_blocks_first(rule, case.block),
            eos_stop=False,
        )
        assert (result.tokens, result.forwards) == (
            reference.tokens,
            reference.forwards,
        ), case


@pytest.mark.parametrize("cache", fast("none", of=CACHES))
def test_literal_mask_token_in_a_prompt_is_text(
    engine: Engine, oracle: TinyLLaDA, cache: str
):
    mask = oracle.mask_id
    # (Masks alone would tie: every position would see the same.)
    prompts = [(3, mask), (mask, 7, mask, mask), (*make_prompt(20), mask, mask, 4)]
    cases = [
        Case(prompt, rule, cache, max_tokens=24, ignore_eos=True)
        for prompt in prompts
        for rule in ("static/low_confidence", "threshold")
    ]
    wanted = [expect(case, oracle) for case in cases]
    assert_equal(cases, run_cases(engine, cases), wanted)


FEW_EXACT = ("none", range(9, 18))


@pytest.mark.parametrize(
    ("cache", "numbers"),
    fast(FEW_EXACT, of=[FEW_EXACT, *((cache, range(24)) for cache in CACHES)]),
)
def test_reference_exact(engine: Engine, oracle: TinyLLaDA, cache: str, numbers: range):
    """The mask id has mass and may be chosen, as in the published static loop.

    One block: the published loop goes on to fill masks that are left over from later
    blocks, the engine ends a block for good, with the mask id as a token.
    """
    cases = [
        Case(
            make_prompt(number + 1, number),
            cache=cache,
            block=32,
            max_tokens=32,
            steps=None if number % 3 else 11,
            ignore_eos=True,
        )
        for number in numbers
    ]
    wanted = [expect(case, oracle, forbid_mask=False) for case in cases]
    got = run_cases(engine, cases, reference_exact=True)
    # Steps that wasted themselves on the mask id count as well.
    assert {result.forwards for result in got} == {11, 32}
    by_schedule = [
        replace(expected, forwards=case.steps or case.block)
        for case, expected in zip(cases, wanted, strict=True)
    ]
    assert_equal(cases, got, by_schedule)
    with_masks = sum(oracle.mask_id in expected.tokens for expected in wanted)
    assert 3 <= with_masks < len(cases)
    # Elsewhere its mass alone makes a difference.
    banned = [expect(case, oracle).tokens for case in cases]
    assert sum(e.tokens != b for e, b in zip(wanted, banned, strict=True)) > with_masks


FEW_PREDICTED = ("dual", "block", 12)
PREDICTED = [*itertools.product(CACHES, ("token", "block", "canvas"), (32,))]


@pytest.mark.parametrize(
    ("cache", "eotp", "longest"), fast(FEW_PREDICTED, of=[FEW_PREDICTED, *PREDICTED])
)
def test_end_of_text_predicted_wrongly(
    engine: Engine, oracle: TinyLLaDA, cache: str, eotp: str, longest: int
):
    """An unsure EOS cuts the canvas and then becomes another token.

    Cut after it (token), the text ends there; cut after its block (block, canvas), it
    goes on from there on a further canvas.
    """
    cases = [
        Case(
            make_prompt(length, 1),
            f"learn2pd/{eotp}",
            cache,
            block=(8, 16)[length % 2],
            max_tokens=64,
            number=0.02,
        )
        for length in range(1, longest + 1)
    ]
    wanted = [expect(case, oracle) for case in cases]
    got = run_cases(engine, cases)
    assert_equal(cases, got, wanted)
    if eotp == "token":
        ended = [r for r in got if len(r.tokens) < 64 and r.tokens[-1] != oracle.eos_id]
        assert len(ended) >= 3
        assert {result.output.finish_reason for result in ended} == {"length"}
    else:
        off = [expect(replace(case, rule="learn2pd/off"), oracle) for case in cases]
        went_on = [e.tokens != o.tokens for e, o in zip(wanted, off, strict=True)]
        assert sum(went_on) >= 3
