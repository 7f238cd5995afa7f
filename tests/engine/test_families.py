# SPDX-License-Identifier: Apache-2.0
"""Every family against its oracle: whole generations, token for token."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from engine import block_cases
from engine.block_cases import BlockCase
from engine.cases import (
    Case,
    assert_equal,
    assert_same_tokens,
    expect,
    make_prompt,
    run_cases,
)
from engine.families import (
    CAUSAL_CONTEXT,
    FULL_ATTENTION,
    REUSES_BLOCKS,
    Serve,
    Served,
    names,
    serving,
)
from engine.harness import Engine, finished
from tiers import fast

TWINS = (
    # SDAR's network and attention, and those of A2D from Llama with SDAR's.
    *("DreamReasoner-8B", "Stable-DiffCoder-8B-Instruct"),
    # Other block lengths; these checkpoints have other tests with engines.
    *("SDAR-4B-Chat-b16", "LLaDA2.1-mini", "Nemotron-Labs-Diffusion-8B"),
)


def others_slow(served: tuple[Served, ...], *kinds: str) -> list[Any]:
    """Those of these folders as they are, the others marked slow."""
    return fast(*(one for one in served if one.folder in kinds), of=served)


def twins_slow(served: tuple[Served, ...]) -> list[Any]:
    """Those of `TWINS` marked slow."""
    return fast(*(one for one in served if one.folder not in TWINS), of=served)


@pytest.fixture(scope="module")
def serve(
    engines: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
) -> Serve:
    return serving(engines, tmp_path_factory.getbasetemp() / "families")


def block_sample(served: Served) -> list[BlockCase]:
    """Every residue of the prompt's length mod B; texts that end inside a block."""
    source = random.Random(served.folder)
    block = served.block
    lengths = [*range(1, block + 1), *range(2 * block, 3 * block)][: 2 * block]
    rules = itertools.cycle(block_cases.RULES)
    cases = []
    for number, length in enumerate(lengths):
        cases.append(
            BlockCase(
                make_prompt(length, seed=number),
                max_tokens=source.randint(1, 2 * block + 3),
                rule=next(rules),
                steps_per_block=source.choice([None, 3, block // 2]),
                ignore_eos=number % 3 == 0,
            )
        )
    # Half of them, in which there is every residue, and nearly every rule.
    kept = ((0, 1, 2, 3), (0, 5, 6, 7))
    return [
        case for number, case in enumerate(cases) if number % 8 in kept[number >= block]
    ]


EVERY = pytest.mark.parametrize("is_every", fast(False, of=(False, True)))
"""Every case of a family, or a few."""


@EVERY
@pytest.mark.parametrize("served", twins_slow(REUSES_BLOCKS), ids=names(REUSES_BLOCKS))
def test_block_parity(serve: Serve, served: Served, is_every: bool):
    engine, oracle = serve(served)
    cases = block_sample(served)
    if not is_every:
        cases = cases[:: -(-len(cases) // 5)]
    wanted = [block_cases.expect(case, oracle, engine) for case in cases]
    assert_equal(cases, block_cases.run(engine, cases), wanted)
    alone = random.Random(0).sample(range(len(cases)), 6 if is_every else 1)
    got = [block_cases.run(engine, [cases[i]])[0] for i in alone]
    assert_equal([cases[i] for i in alone], got, [wanted[i] for i in alone])


@pytest.mark.slow
@pytest.mark.parametrize("served", REUSES_BLOCKS, ids=names(REUSES_BLOCKS))
def test_in_chunks_and_few_pages(serve: Serve, served: Served):
    """Prompts of several forwards; requests that lose their pages and start over."""
    engine, oracle = serve(
        served, max_num_batched_tokens=64, num_gpu_blocks_override=13
    )
    cases = [
        BlockCase(make_prompt(length), max_tokens=80, rule=rule, ignore_eos=True)
        for length, rule in zip(
            (9, 64, 71, 95, 96, 100, 130, 150), itertools.cycle(block_cases.RULES)
        )
    ]
    wanted = [block_cases.expect(case, oracle, engine) for case in cases]
    # The longest prompts, of most chunks, and the shortest.
    for some in (slice(0, 1), slice(6, 8)):
        alone = [block_cases.run(engine, [case])[0] for case in cases[some]]
        assert_equal(cases[some], alone, wanted[some])

    outputs, _ = engine.run_short_of_pages(
        [case.prompt for case in cases], [case.params() for case in cases]
    )
    assert_same_tokens([output.outputs[0].token_ids for output in outputs], wanted)


@pytest.mark.parametrize(
    "served",
    # Blocks that begin at position 0, and at the prompt's end.
    others_slow(REUSES_BLOCKS, "SDAR-4B-Chat", "Qwen3-0.6B-diffusion-bd3lm-v0.1"),
    ids=names(REUSES_BLOCKS),
)
def test_shared_prefixes(serve: Serve, served: Served):
    """A prompt, more of its text, and all of it, whose pages are there already."""
    engine, oracle = serve(served)
    first = BlockCase(make_prompt(75, seed=7), max_tokens=70, ignore_eos=True)
    text = [*first.prompt, *block_cases.run(engine, [first])[0].tokens]
    for known, more in ((41, 3), (64, 5), (64, 0), (75, 0), (len(text), 3)):
        prompt = (*text[:known], *make_prompt(more, seed=known))
        case = BlockCase(prompt, max_tokens=40, rule="dynamic")
        output = engine.outputs([prompt], case.params())[0]
        # What a token of a -bd3lm- model sees depends on its prompt's length.
        is_shared = engine.scheduler.dlm_defaults.block_origin == "start"
        is_shared |= served in CAUSAL_CONTEXT
        assert (output.num_cached_tokens > 0) == is_shared
        wanted = block_cases.expect(case, oracle, engine)
        assert_equal([case], [finished(output.outputs[0])], [wanted])


def test_pages_of_a_causal_context(serve: Serve):
    """Pages of prompts and of finished text, which end anywhere in blocks."""
    engine, oracle = serve(CAUSAL_CONTEXT[0])
    page = engine.scheduler.block_size
    first = BlockCase(make_prompt(45, seed=1), max_tokens=96, ignore_eos=True)
    text = [*first.prompt, *block_cases.run(engine, [first])[0].tokens]
    # The last block's KV was never computed with all of its tokens in place.
    shared = (len(text) - 32) // page * page
    # The third prompt is there already, as a whole; but its last row has to predict.
    for known, more, found in (
        (41, 3, 32),
        (64, 3, 64),
        (64, 0, 32),
        (len(text), 3, shared),
    ):
        prompt = (*text[:known], *make_prompt(more, seed=known))
        case = BlockCase(prompt, max_tokens=40, ignore_eos=True)
        output = engine.outputs([prompt], case.params())[0]
        assert output.num_cached_tokens == found
        wanted = block_cases.expect(case, oracle, engine)
        assert_equal([case], [finished(output.outputs[0])], [wanted])


@EVERY
@pytest.mark.parametrize("served", FULL_ATTENTION, ids=names(FULL_ATTENTION))
def test_full_attention_parity(serve: Serve, served: Served, is_every: bool):
    engine, oracle = serve(served)
    source = random.Random(served.folder)
    rules = ("static/low_confidence", "threshold", "factor", "static/margin")
    cases = [
        Case(
            make_prompt(source.randint(1, 60), seed=number),
            rule=rule,
            cache=cache,
            block=block,
            max_tokens=source.randint(1, 3 * block),
            ignore_eos=number % 3 == 0,
        )
        for number, (rule, cache, block) in enumerate(
            itertools.product(rules, ("none", "prefix", "dual"), (8, 16))
        )
    ]
    if not is_every:
        cases = cases[::5]  # of each rule and policy
    wanted = [expect(case, oracle, shift=served.shift) for case in cases]
    assert_equal(cases, run_cases(engine, cases), wanted)
    alone = source.sample(range(len(cases)), 4 if is_every else 1)
    got = [run_cases(engine, [cases[i]])[0] for i in alone]
    assert_equal([cases[i] for i in alone], got, [wanted[i] for i in alone])
