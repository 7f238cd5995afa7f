# SPDX-License-Identifier: Apache-2.0
"""Rows, drafts and pages of FreeDave on real engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from engine.cases import make_prompt
from engine.freedave_cases import (
    Asked,
    Serve,
    assert_nothing_is_lost,
    branches_of,
    one_by_one,
    run,
    serving,
    static,
)
from engine.harness import Engine, Finished, finished
from engine.test_counts import counting

from vllm_dlm import step_map


@pytest.fixture(scope="module")
def serve(engines: Serve, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    return serving(engines, tmp_path_factory.getbasetemp() / "freedave")


def test_rows_of_every_forward(serve: Serve):
    """Every branch costs a block's rows, and lm_head sees those of its masks."""
    engine = serve("SDAR-4B-Chat")
    asked = Asked(make_prompt(16), max_tokens=12, drafts=3)
    engine.llm.reset_prefix_cache()
    with counting(engine) as counts, branches_of(engine) as branches:
        (result,) = run(engine, [asked], Asked.drafted)
    assert result.forwards == len(counts.rows) == len(branches)
    first = [i for i, count in enumerate(branches) if count == 1 and i]
    assert counts.rows[0] == 16 + 4  # the prompt and the block
    for number, (rows, count) in enumerate(zip(counts.rows, branches, strict=True)):
        # A first forward computes the block before as well, for good.
        assert rows in ((4 * count,) if count > 1 else (4, 8, 20)), number
        assert counts.logits_rows[number] % count == 0
        assert counts.logits_rows[number] <= 4 * count
    assert len(first) >= 2 and max(branches) == 3


def test_drafts_take_no_rows_from_others(busy_engine: Engine):
    """Two requests of 60 rows leave 8 of 128; one alone leaves room for a draft."""
    asked = Asked(make_prompt(28), max_tokens=32, block=32)
    other = replace(asked, prompt=make_prompt(28, seed=1))
    wanted = run(busy_engine, [asked, other], static)
    with branches_of(busy_engine) as branches:
        got = busy_engine.run(
            [asked.prompt, other.prompt], [asked.drafted(), static(other)]
        )
    assert set(branches) == {2}
    assert [one.forwards for one in got] == [one.forwards for one in wanted]
    assert [one.tokens for one in got] == [one.tokens for one in wanted]
    with branches_of(busy_engine) as branches:
        alone = run(busy_engine, [asked], Asked.drafted)
    assert set(branches) == {1, 2}
    assert_nothing_is_lost([asked], alone, wanted[:1])
    assert alone[0].forwards < wanted[0].forwards


def test_drafts_fit_into_the_context(small_engine: Engine):
    """Pages of 32, a context of 128: a request of 3 pages has none for drafts."""
    for prompt, most in ((30, 2), (70, 1)):
        asked = Asked(make_prompt(prompt), max_tokens=24, block=12)
        wanted = run(small_engine, [asked], static)
        with branches_of(small_engine) as branches:
            got = run(small_engine, [asked], Asked.drafted)
        assert max(branches) == most
        assert_nothing_is_lost([asked], got, wanted)


def run_short_of_pages(engine: Engine, asked: Sequence[Asked]) -> list[Finished]:
    """What requests finish with, of which some lose their pages on the way."""
    outputs, _ = engine.run_short_of_pages(
        [one.prompt for one in asked], [one.drafted() for one in asked]
    )
    return [finished(output.outputs[0]) for output in outputs]


def assert_same_texts_and_steps(
    got: Sequence[Finished], wanted: Sequence[Finished]
) -> None:
    """But for forwards, of which those that were preempted have had more."""
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.tokens == theirs.tokens
        assert step_map(ours.output).steps == step_map(theirs.output).steps
        assert step_map(ours.output).beyond == step_map(theirs.output).beyond


@pytest.mark.slow
def test_few_pages_in_full_attention(small_engine: Engine):
    asked = [
        Asked(make_prompt(5 * n, seed=n), max_tokens=75, block=16, drafts=8)
        for n in range(1, 6)
    ]
    wanted = one_by_one(small_engine, asked, static)
    free = small_engine.free_pages
    assert_same_texts_and_steps(run_short_of_pages(small_engine, asked), wanted)
    small_engine.flush()
    assert small_engine.free_pages == free


@pytest.mark.parametrize(
    "name", [pytest.param("SDAR-4B-Chat", marks=pytest.mark.slow), "Fast_dLLM_v2_7B"]
)
@pytest.mark.slow
def test_few_pages_block_after_block(serve: Serve, name: str):
    engine = serve(name, num_gpu_blocks_override=13, max_num_batched_tokens=64)
    asked = [
        Asked(make_prompt(length, seed=length), max_tokens=60, drafts=8)
        for length in (9, 64, 71, 95, 100, 150)
    ]
    wanted = one_by_one(engine, asked, static)
    assert_same_texts_and_steps(run_short_of_pages(engine, asked), wanted)
