# SPDX-License-Identifier: Apache-2.0
"""Finished blocks' KV, written along with the next block or by a forward of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engine.block_cases import BlockCase, run
from engine.block_engines import BLOCK, BlockEngines, recording, rows_of
from engine.cases import make_prompt
from engine.harness import Engine
from engine.test_counts import counting
from reference.checkpoints import write_checkpoint
from vllm import LLM

CASES = [
    BlockCase(make_prompt(1 + 7 * number % 50, number), max_tokens, rule, ignore_eos=i)
    for number, (rule, max_tokens, i) in enumerate(
        [
            ("threshold", 64, False),
            ("sequential", 16, True),
            ("sequential", 33, True),
            ("static", 48, False),
            ("joint", 50, True),
            ("dynamic", 64, True),
            ("factor", 40, False),
            ("threshold", 1, True),
        ]
    )
]


@pytest.fixture(scope="module")
def sdar(engines: Callable[..., Engine], tmp_path_factory) -> BlockEngines:
    return BlockEngines(engines, tmp_path_factory.getbasetemp(), "SDAR-4B-Chat-b16")


@pytest.fixture(scope="module")
def fast_dllm(engines: Callable[..., Engine], tmp_path_factory) -> BlockEngines:
    return BlockEngines(engines, tmp_path_factory.getbasetemp(), "Fast_dLLM_v2_7B")


def both(model: BlockEngines) -> tuple[Engine, Engine]:
    """Engines that commit fused and separately."""
    options = {"block_length": BLOCK}
    return model(dlm=options), model(dlm=options | {"commit": "separate"})


def finished_blocks(case: BlockCase, tokens: int) -> int:
    """Blocks that the request has decided and gone on behind."""
    first = len(case.prompt) // BLOCK
    last = (len(case.prompt) + tokens - 1) // BLOCK
    return last - first


def test_one_forward_more_for_each_finished_block(sdar: BlockEngines):
    """The last block of a request is never written for good: nobody reads it."""
    fused, separate = (run(engine, CASES) for engine in both(sdar))
    assert [r.tokens for r in separate] == [r.tokens for r in fused]
    more = [s.forwards - f.forwards for s, f in zip(separate, fused, strict=True)]
    assert more == [
        finished_blocks(case, len(result.tokens))
        for case, result in zip(CASES, fused, strict=True)
    ]
    assert sum(more) > 10


def test_rows_of_both_ways(sdar: BlockEngines):
    case = BlockCase(make_prompt(20), 40, rule="sequential", ignore_eos=True)
    rows = []
    for engine in both(sdar):
        engine.llm.reset_prefix_cache()
        with recording(engine) as forwards, counting(engine) as counts:
            name = engine.add(case.prompt, case.params())
            while engine.busy:
                engine.step()
        rows.append(rows_of(forwards, name))
        assert counts.rows == [end - start for start, end in rows[-1]]
    fused, separate = rows
    assert fused == (
        [(0, 32)]
        + 11 * [(16, 32)]
        + [(16, 48)]
        + 15 * [(32, 48)]
        + [(32, 64)]
        + 11 * [(48, 64)]
    )
    assert separate == (
        [(0, 32)]
        + 11 * [(16, 32)]
        + [(16, 32)]
        + 16 * [(32, 48)]
        + [(32, 48)]
        + 12 * [(48, 64)]
    )


def test_a_seed_writes_the_block_before_it_in_any_case(fast_dllm: BlockEngines):
    fused, separate = (run(engine, CASES) for engine in both(fast_dllm))
    assert separate == fused


def test_a_causal_context(engines: Callable[..., Engine], tmp_path_factory):
    """Causal attention: the finished block becomes causal in a forward of its own."""
    folder: Path = tmp_path_factory.mktemp("nemotron") / "unseeded"
    write_checkpoint("nemotron", folder, seed=2, dlm_seeds=False)
    results = [
        run(
            engines(
                model=str(folder),
                dlm={"block_length": BLOCK, "commit": commit},
                max_model_len=250,
            ),
            CASES,
        )
        for commit in ("fused", "separate")
    ]
    fused, separate = results
    assert [r.tokens for r in separate] == [r.tokens for r in fused]
    assert [s.forwards - f.forwards for s, f in zip(separate, fused, strict=True)] == [
        # Blocks are counted from the prompt's end.
        (len(result.tokens) - 1) // BLOCK
        for result in fused
    ]


def test_full_attention_has_nothing_to_commit(checkpoint: Path):
    dlm = {"commit": "separate"}
    with pytest.raises(ValueError, match="leave it at 'fused'"):
        LLM(str(checkpoint), additional_config={"dlm": dlm}, enforce_eager=True)
