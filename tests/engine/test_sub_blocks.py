# SPDX-License-Identifier: Apache-2.0
"""`dual` in sub-blocks, which is Fast-dLLM v2's `use_block_cache`."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engine.cases import assert_same_tokens, make_prompt
from engine.fast_dllm_cases import (
    Loop,
    Wanted,
    assert_equal,
    rows_of,
    step_by_step,
)
from engine.harness import Engine, Finished, params
from reference.checkpoints import write_checkpoint
from reference.fast_dllm_procedures import generate_sub_blocks
from reference.network import TinyModel
from tiers import fast


@pytest.fixture(scope="module")
def v2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v2") / "Fast_dLLM_v2_7B"
    return write_checkpoint("fast_dllm_v2", folder, seed=2)


@pytest.fixture(scope="module")
def v2_oracle(v2_folder: Path) -> TinyModel:
    return TinyModel.from_folder(v2_folder)


@pytest.fixture(scope="module")
def v2_engine(engines: Callable[..., Engine], v2_folder: Path) -> Engine:
    return engines(model=str(v2_folder))


SUB_BLOCKS = (8, 8, 4, 16, 3, 31)
"""Of requests, in turn; 8 is the family's own. 3 and 31 leave a short one."""


def v2_cases(lengths: Sequence[int], seed: str) -> list[Loop]:
    source = random.Random(seed)
    rules = ("threshold/strict", "static", "factor", "dream/maskgit_plus", "threshold")
    return [
        Loop(
            make_prompt(length, seed=number),
            max_tokens=source.randint(1, 80),
            rule=rules[number % len(rules)],
            block=SUB_BLOCKS[number % len(SUB_BLOCKS)],
            steps=source.choice((None, 5, 16)) if number % 5 == 1 else None,
            ignore_eos=number % 3 > 0,
        )
        for number, length in enumerate(lengths)
    ]


def v2_wanted(case: Loop, oracle: TinyModel, **options: Any) -> Wanted:
    decode = partial(
        generate_sub_blocks,
        oracle,
        list(case.prompt),
        max_tokens=case.max_tokens,
        block_length=32,
        sub_block_length=case.block,
        steps_per_block=case.steps,
        eos_stop=not case.ignore_eos,
        **({"max_model_len": 256} | options),
    )
    return Wanted.of(decode, case)


def run_v2(engine: Engine, cases: Sequence[Loop], **options: Any) -> list[Finished]:
    mask_id = engine.scheduler.dlm_defaults.mask_token_id
    return engine.run(
        [case.prompt for case in cases],
        [
            replace(case, mask=True).params(
                mask_id, **{"sub_block_length": case.block} | options
            )
            for case in cases
        ],
    )


@pytest.mark.parametrize("every", fast(12, of=(12, 1)))
def test_sub_blocks(v2_engine: Engine, v2_oracle: TinyModel, every: int):
    """Lengths of a prompt's tail; eight at a time, and alone."""
    lengths = [*range(1, 34, every), *range(62, 98, every)]
    cases = v2_cases(lengths, "tails")
    wanted = [v2_wanted(case, v2_oracle) for case in cases]
    assert_equal(cases, run_v2(v2_engine, cases), wanted)
    alone = random.Random(0).sample(range(len(cases)), 6 if every == 1 else 2)
    got = [run_v2(v2_engine, [cases[i]])[0] for i in alone]
    assert_equal([cases[i] for i in alone], got, [wanted[i] for i in alone])
    # It is an approximation: some of the texts are others without it.
    whole = [v2_wanted(case, v2_oracle, refresh=True) for case in cases]
    assert_equal(cases, run_v2(v2_engine, cases, cache="none"), whole)
    assert [one.tokens for one in whole] != [one.tokens for one in wanted]


@pytest.mark.parametrize(
    ("cache", "every"), fast(("dual", 2), of=(("dual", 2), ("none", 1), ("dual", 1)))
)
def test_masks_that_a_schedule_leaves(
    v2_engine: Engine, v2_oracle: TinyModel, cache: str, every: int
):
    """A block is over with its steps, also where sub-blocks were not reached."""
    cases = [
        Loop(
            make_prompt(length, seed=length),
            max_tokens=70,
            rule=("static", "dream/maskgit_plus", "dream/topk_margin")[number % 3],
            block=SUB_BLOCKS[number % len(SUB_BLOCKS)],
            steps=(1, 2, 3, 5, 7)[number % 5],
        )
        for number, length in enumerate((*range(1, 34, 3), 63, 64, 65, 96))
    ][::every]
    options = {"forbid_mask": False, "refresh": cache == "none"}
    wanted = [v2_wanted(case, v2_oracle, **options) for case in cases]
    got = run_v2(v2_engine, cases, cache=cache, reference_exact=True)
    assert_equal(cases, got, wanted)
    mask_id = v2_oracle.mask_id
    assert sum(mask_id in one.tokens for one in wanted) > len(cases) // 2


SEEDS_OF_MASKS = (47, 226, 262)
"""Prompts of 32 tokens behind which the mask id is the most probable."""


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_seed_that_is_the_mask_id(
    v2_engine: Engine, v2_oracle: TinyModel, cache: str
):
    """With `reference_exact`: then the first position's own row predicts it."""
    cases = [
        Loop(make_prompt(32, seed), 64, rule, steps=steps)
        for seed in SEEDS_OF_MASKS
        for rule, steps in (
            ("static", None),
            ("static", 3),
            ("threshold/strict", None),
            ("threshold/one", None),
        )
    ]
    options = {"forbid_mask": False, "refresh": cache == "none"}
    wanted = [v2_wanted(case, v2_oracle, **options) for case in cases]
    assert all(one.step_of_position[0] > 0 for one in wanted)
    exact = {"cache": cache, "reference_exact": True}
    assert_equal(cases, run_v2(v2_engine, cases, **exact), wanted)
    alone = [run_v2(v2_engine, [case], **exact)[0] for case in cases[:2]]
    assert_equal(cases[:2], alone, wanted[:2])


@pytest.mark.parametrize(
    "rule", fast("threshold/strict", of=("static", "threshold/strict"))
)
def test_a_replay_after_a_seed_that_is_the_mask_id(v2_engine: Engine, rule: str):
    case = Loop(make_prompt(32, SEEDS_OF_MASKS[0]), 60, rule, "none", mask=True)
    sampling = case.params(0, reference_exact=True)
    tokens, _, places = step_by_step(v2_engine, case.prompt, sampling)
    for stop in range(1, len(places), 11):
        assert step_by_step(v2_engine, case.prompt, sampling, stop)[0] == tokens


@pytest.mark.parametrize("length", fast(45, of=(3, 32, 45, 57)))
def test_rows_of_sub_blocks(v2_engine: Engine, v2_oracle: TinyModel, length: int):
    for seed, rule in enumerate(("static", "threshold/strict"), start=200):
        case = Loop(make_prompt(length, seed), 70, rule)  # no page of it is there
        wanted = v2_wanted(case, v2_oracle)
        rows = [end - start for start, end in wanted.rows]
        # The prompt is computed along with the first block, or its seed.
        if length % 32:
            rows[0] += length // 32 * 32
        got = rows_of(v2_engine, replace(case, mask=True))
        assert got == rows
        assert 8 in rows and 32 in rows


@pytest.mark.slow
def test_sub_blocks_without_a_shift(engines: Callable[..., Engine], tmp_path: Path):
    """Of any block-causal model, if a request or the server sets their length."""
    folder = write_checkpoint("sdar", tmp_path / "SDAR-4B-Chat-b32", seed=2)
    engine, oracle = engines(model=str(folder)), TinyModel.from_folder(folder)
    cases = v2_cases((*range(1, 40, 7), 64, 77), "no shift")
    cases = [case for case in cases if case.rule != "static"]
    wanted = [v2_wanted(case, oracle, shift=0) for case in cases]
    assert_equal(cases, run_v2(engine, cases), wanted)


@pytest.mark.slow
def test_drawn_sub_blocks_are_those_of_any_batch(v2_engine: Engine):
    cases = [replace(case, mask=True) for case in v2_cases((5, 32, 40, 64, 90), "T")]
    sampling = [
        case.params(
            0,
            drawn={"temperature": 0.9, "top_p": 0.9, "seed": number},
            sub_block_length=case.block,
            eotp=("off", "token")[number % 2],
        )
        for number, case in enumerate(cases)
    ]
    prompts = [case.prompt for case in cases]
    together = v2_engine.run(prompts, sampling)
    alone = [
        v2_engine.run([prompt], one)[0]
        for prompt, one in zip(prompts, sampling, strict=True)
    ]
    assert alone == together


def test_blocks_of_one_after_sub_blocks(v2_engine: Engine, v2_oracle: TinyModel):
    """`tccf` goes on in blocks without sub-blocks."""
    case = Loop(make_prompt(38, seed=1), 60, "threshold/strict", mask=True)
    text = v2_wanted(case, v2_oracle).tokens
    tccf = {"trigger": text[20:21], "check": [3, 4, 5], "critic_tokens": 0}
    at = text.index(text[20])
    both = [case.params(0, tccf=tccf)] * 2
    (first, second) = v2_engine.run([case.prompt] * 2, both)
    assert first == second
    assert first.tokens[: at + 3] == [*text[:at], 3, 4, 5]
    assert len(first.tokens) == 60


def test_who_rewrites_computes_the_block(v2_engine: Engine):
    joint = {"mask_threshold": 0.3, "edit_threshold": 0.1, "max_post_steps": 3}
    results = [
        v2_engine.run(
            [make_prompt(length, seed=300) for length in (20, 32, 40)],
            params(
                50,
                dlm={"strategy": "joint", "strategy_config": joint, "cache": cache},
                ignore_eos=True,
            ),
        )
        for cache in ("none", "dual")
    ]
    assert results[0] == results[1]


@pytest.mark.slow
def test_sub_blocks_in_chunks_and_few_pages(
    engines: Callable[..., Engine], v2_folder: Path, v2_oracle: TinyModel
):
    """Prompts of several forwards; requests that lose their pages and start over."""
    engine = engines(
        {"cache": "dual"},
        model=str(v2_folder),
        max_model_len=213,  # inside a block
        max_num_batched_tokens=64,
        num_gpu_blocks_override=13,
    )
    cases = v2_cases((9, 64, 71, 95, 96, 100, 130, 150), "few pages")
    cases = [replace(case, max_tokens=80, ignore_eos=True) for case in cases]
    wanted = [v2_wanted(case, v2_oracle, max_model_len=213) for case in cases]
    mask_id = engine.scheduler.dlm_defaults.mask_token_id
    outputs, _ = engine.run_short_of_pages(
        [case.prompt for case in cases],
        [
            replace(case, mask=True).params(mask_id, sub_block_length=case.block)
            for case in cases
        ],
    )
    assert_same_tokens([output.outputs[0].token_ids for output in outputs], wanted)


def test_pages_of_sub_blocks_are_shared_once_final(
    v2_engine: Engine, v2_oracle: TinyModel
):
    """Keys that a sub-block's steps have left are never found by another request."""
    first = Loop(make_prompt(75, seed=7), 70, "threshold/strict")
    text = [*first.prompt, *run_v2(v2_engine, [first])[0].tokens]
    for known, more in ((64, 5), (75, 0), (100, 3), (len(text), 3)):
        prompt = (*text[:known], *make_prompt(more, seed=known))
        case = Loop(prompt, 40, "threshold/strict")
        sampling = replace(case, mask=True).params(0)
        output = v2_engine.outputs([prompt], sampling)[0]
        assert output.num_cached_tokens > 0
        wanted = v2_wanted(case, v2_oracle)
        if not wanted.near_tie:
            assert list(output.outputs[0].token_ids) == wanted.tokens


REPLAYED = [*itertools.product(("static", "threshold/strict"), (32, 43))]


@pytest.mark.parametrize(
    ("rule", "length"), fast(("threshold/strict", 43), of=REPLAYED)
)
def test_a_replay_computes_the_same_rows(v2_engine: Engine, rule: str, length: int):
    """After any step of a block, also where its first tokens were handed out."""
    case = Loop(make_prompt(length), 60, rule, mask=True)
    sampling = case.params(0)
    tokens, rows, places = step_by_step(v2_engine, case.prompt, sampling)
    assert {8, 32} <= set(rows)
    for stop in range(1, len(rows), 7):
        got, got_rows, _ = step_by_step(v2_engine, case.prompt, sampling, stop)
        assert got == tokens
        # The active block begins anew, but for a seed that was handed out; its first
        # forward computes again what pages were lost.
        block, step = places[stop]
        seeded = int(step > 0 and block >= length)
        begin = places.index((block, seeded))
        replayed = got_rows[stop + 1 :]
        assert replayed == rows[begin + 1 :]
