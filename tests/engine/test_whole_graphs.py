# SPDX-License-Identifier: Apache-2.0
"""Steps as whole CUDA graphs, as far as that can be told without CUDA.

What a graph would compute is what the oracle tests of the eager engine hold, if the
tensors of the capture are those that every step writes: `cpu_graphs.py` replays them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine.block_cases import BlockCase, run
from engine.block_engines import recording
from engine.cases import Case, make_prompt, run_cases
from engine.cpu_graphs import whole_graphs
from engine.families import Serve, Served, serving
from engine.harness import Engine, Finished, params
from operations import Operations
from tiers import fast
from vllm.config.diffusion import DiffusionConfig
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_dlm.model_executor.planning.segments import Segments

BLOCK = 16
SDAR = Served("sdar", "SDAR-4B-Chat-b16", BLOCK, changes={"head_dim": 64})
SEPARATE = Served(SDAR.family, SDAR.folder, BLOCK, dlm={"commit": "separate"})
SHIFT = Served(
    "fast_dllm_v2",
    "Fast_dLLM_v2_1.5B",
    BLOCK,
    shift=1,
    dlm={"block_length": BLOCK},
    changes={"tie_word_embeddings": True, "head_dim": 128},
)
CAUSAL = Served(
    "nemotron",
    "Nemotron-Labs-Diffusion-8B",
    8,
    changes={"block_size": 8, "head_dim": 64},
)
DREAM = Served("dream", "Dream-v0-Instruct-7B", 32, shift=1)

CASES = [
    BlockCase(make_prompt(1 + 9 * number, seed=number), 40 + number, rule, None, True)
    for number, rule in enumerate(["static", "threshold", "joint", "entropy", "factor"])
]


@pytest.fixture(scope="module")
def serve(engines: Callable[..., Engine], tmp_path_factory) -> Serve:
    return serving(engines, tmp_path_factory.getbasetemp() / "families")


@pytest.fixture(scope="module")
def sdar(serve: Serve) -> Engine:
    return serve(SDAR)[0]


def alone(case: BlockCase) -> tuple[tuple[int, ...], Any]:
    """A prompt and its sampling parameters."""
    return case.prompt, case.params()


def decode(engine: Engine, *requests: tuple[tuple[int, ...], Any]) -> list[Finished]:
    """Decode requests together, on an empty cache of pages."""
    engine.llm.reset_prefix_cache()
    prompts, sampling = zip(*requests, strict=True)
    return engine.run(prompts, sampling)


def poison(engine: Engine) -> None:
    """Ids and positions of rows that no request has: any, as another batch left them.

    vLLM never empties them. Their keys go nowhere, and nobody reads what they see.
    """
    engine.runner.input_buffers.input_ids.fill_(7)
    engine.runner.input_buffers.positions.fill_(3)


# -- tokens ---------------------------------------------------------------------


FITTING, PADDED = [1, 2, 4, 8], [8]
KINDS = {"block": SDAR, "commit": SEPARATE, "shift": SHIFT, "causal": CAUSAL}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    fast(
        ("shift", FITTING),
        of=itertools.product(KINDS, (FITTING, PADDED)),
    ),
)
def test_models_that_reuse_blocks(serve: Serve, kind: str, sizes: list[int]):
    served = KINDS[kind]
    engine, _ = serve(served)
    wanted = run(engine, CASES)
    with whole_graphs(engine, served.block, sizes) as graphs:
        poison(engine)
        assert run(engine, CASES) == wanted
    assert len(graphs.replayed) > 20
    assert set(graphs.sizes) <= set(sizes)


FULL_CASES = [
    Case(make_prompt(1 + 9 * number, seed=number), rule, "dual", max_tokens=40)
    for number, rule in enumerate(["threshold", "static/low_confidence", "factor"])
]


@pytest.mark.parametrize("sizes", fast([4], of=([1, 2, 4], [4])))
def test_full_attention(engine: Engine, sizes: list[int]):
    wanted = run_cases(engine, FULL_CASES)
    with whole_graphs(engine, 16, sizes) as graphs:
        poison(engine)
        assert run_cases(engine, FULL_CASES) == wanted
    assert len(graphs.replayed) > 20


@pytest.mark.slow
def test_full_attention_with_a_shift(serve: Serve):
    """The row left of the block is computed too."""
    engine, _ = serve(DREAM)
    wanted = run_cases(engine, FULL_CASES)
    with whole_graphs(engine, 17, [1, 2, 4]) as graphs:
        assert run_cases(engine, FULL_CASES) == wanted
    assert len(graphs.replayed) > 20


# -- which steps ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("served", "all_of_them"),
    fast(
        (SDAR, False),
        of=((SDAR, False), (SEPARATE, True), (SHIFT, True), (CAUSAL, True)),
    ),
    ids=["fused", "separate", "shift", "causal"],
)
def test_which_steps_are_replays(serve: Serve, served: Served, all_of_them: bool):
    """Behind the prompt: those in the middle of a block, or all of them.

    Where it is fused, a block's first step computes the block before it too.
    """
    engine, _ = serve(served)
    case = BlockCase(make_prompt(32), 60, rule="sequential", ignore_eos=True)
    with whole_graphs(engine, served.block, [1]) as graphs, recording(engine) as steps:
        decode(engine, alone(case))
    parts = [part for step in steps for part in step.values()]
    rows = [part.end - part.start for part in parts if part.start >= 32]
    assert len(rows) > 50
    assert len(graphs.replayed) == rows.count(served.block)
    blocks = -(-60 // served.block)
    assert len(rows) - len(graphs.replayed) == (0 if all_of_them else blocks - 1)


@pytest.mark.slow
def test_blocks_of_half_the_length(serve: Serve):
    """A step has as many rows as the server's usual step, and two segments.

    In the second stage of `tccf` a block-causal model writes blocks of one position:
    half of the blocks of two that are served here. Each step computes the block before
    the active one along with it.
    """
    engine, _ = serve(Served(SDAR.family, SDAR.folder, 2, dlm={"block_length": 2}))
    usual = (make_prompt(32), params(20, ignore_eos=True))
    plain = (make_prompt(16), params(30, ignore_eos=True))
    trigger = decode(engine, plain)[0].tokens[4]
    tccf = {"tccf": {"trigger": [trigger], "check": [7, 8, 9]}}
    half = (plain[0], params(30, dlm=tccf, ignore_eos=True))
    for requests in ([half], [half, usual, half]):
        wanted = decode(engine, *requests)
        with whole_graphs(engine, 2, [1, 2, 4]) as graphs:
            poison(engine)
            assert decode(engine, *requests) == wanted
        assert graphs.replayed


# -- addresses ------------------------------------------------------------------


def test_addresses(sdar: Engine):
    """All tensors of a replay's metadata are those of its capture, in every step."""
    with whole_graphs(sdar, BLOCK, [1, 2, 4]) as graphs:
        run(sdar, CASES)
    assert len({desc for desc, _ in graphs.replayed}) == 3
    for desc, prepared in graphs.replayed:
        assert prepared == graphs.captured[desc]
    # Graphs of all sizes, and of a second capture, lie in the same places.
    starts = {
        field: {at[field][0] for at in graphs.captured.values()}
        for field in graphs.captured[desc]
    }
    assert all(len(found) == 1 for found in starts.values())
    with whole_graphs(sdar, BLOCK, [1, 2, 4]) as again:
        assert again.captured == graphs.captured


def test_flags_of_causal_rows_lie_there_too(serve: Serve):
    engine, _ = serve(CAUSAL)
    with whole_graphs(engine, CAUSAL.block, [2]) as graphs:
        run(engine, CASES[:2])
    fields = {field for _, field in graphs.replayed[0][1]}
    assert "dynamic_causal" in fields
    assert all(at == graphs.captured[desc] for desc, at in graphs.replayed)


# -- work of a step ---------------------------------------------------------------


def operations(engine: Engine, count: int) -> list[list[str]]:
    """What `prepare_attn` sends in each step of requests that begin together."""
    state, steps = engine.runner.model_state, []
    prepare_attn = state.prepare_attn

    def counted(*args: Any, **kwargs: Any) -> Any:
        with Operations() as seen:
            metadata = prepare_attn(*args, **kwargs)
        steps.append(seen.names)
        return metadata

    state.prepare_attn = counted
    try:
        run(engine, [replace(CASES[0], max_tokens=20)] * count)
    finally:
        state.prepare_attn = prepare_attn
    return steps


@pytest.mark.parametrize(
    "served", fast(CAUSAL, of=(SDAR, CAUSAL)), ids=["block", "causal"]
)
def test_operations_of_a_step(serve: Serve, served: Served):
    """One transfer, one gathering of pages, and what the backend adds."""
    engine, _ = serve(served)
    one, many = operations(engine, 1), operations(engine, 8)
    with whole_graphs(engine, served.block, [1, 8]):
        replayed = operations(engine, 8)
    assert {len(names) for names in one + many + replayed} == {len(one[0])}
    assert len(one[0]) <= 6, one[0]


# -- branches ---------------------------------------------------------------------


def drafting(drafts: int) -> tuple[tuple[int, ...], Any]:
    dlm = {"strategy": "freedave", "strategy_config": {"drafts": drafts}}
    return make_prompt(48), params(48, dlm=dlm, ignore_eos=True)


def widths(engine: Engine, *requests: tuple[tuple[int, ...], Any]) -> list[int]:
    """Rows of each forward behind the prompt, of one request."""
    with recording(engine) as forwards:
        decode(engine, *requests)
    parts = [part for forward in forwards for part in forward.values()]
    return [part.end - part.start for part in parts if part.start >= 48]


def test_two_branches(sdar: Engine):
    """As many rows as a block of twice the length, on pages of their own.

    A server's usual step can have as many where the context ends inside a block.
    """
    request, width = drafting(2), 2 * BLOCK
    wanted = decode(sdar, request)
    with whole_graphs(sdar, width, [1]) as graphs:
        poison(sdar)
        assert decode(sdar, request) == wanted
    assert width in widths(sdar, request)
    assert graphs.replayed


@pytest.mark.slow
def test_no_more_branches_than_a_graph_has_segments(
    sdar: Engine, monkeypatch: pytest.MonkeyPatch
):
    """vLLM would take three branches, each of a third of the rows, for a block."""
    request, width = drafting(3), 3 * BLOCK
    wanted = decode(sdar, request)
    assert width in widths(sdar, request)
    monkeypatch.setattr(sdar.scheduler, "num_spec_tokens", width)
    assert width not in widths(sdar, request)
    assert [one.tokens for one in decode(sdar, request)] == [
        one.tokens for one in wanted
    ]


def test_more_segments_than_a_graph_has_are_an_error(sdar: Engine):
    runner = sdar.runner
    batch = InputBatch.make_dummy(1, 48, runner.input_buffers)
    keys = np.array([16, 32, 48])
    starts = np.array([0, 16, 32, 48], np.int32)
    segments = Segments(np.zeros(3, np.int64), starts, keys, keys > 32)
    plan = SimpleNamespace(
        segments=segments,
        kv_lens_np=keys,
        causal_np=None,
        branches=None,
        guessed_left=None,
    )
    tables = runner.block_tables.get_dummy_block_tables(1)
    fill = runner.model_state._attention.fill
    assert fill(plan, batch, tables, is_whole=False).seq_lens.tolist() == [16, 32, 48]
    with pytest.raises(RuntimeError, match="3 segments do not fit"):
        fill(plan, batch, tables, is_whole=True)


# -- what may be captured ---------------------------------------------------------


def support(engine: Engine, width: int) -> tuple[AttentionCGSupport, str]:
    state = engine.runner.model_state
    config, told = state.vllm_config, state.vllm_config.diffusion_config
    config.diffusion_config = DiffusionConfig(canvas_length=width)
    try:
        return state.get_additional_cg_support()
    finally:
        config.diffusion_config = told


def test_support(sdar: Engine, engine: Engine):
    assert support(sdar, BLOCK)[0] is AttentionCGSupport.UNIFORM_BATCH
    # The hook has asked for none on a CPU.
    assert support(sdar, 1)[0] is AttentionCGSupport.NEVER
    # Served without a cache: a step computes all of the canvas.
    level, reason = support(engine, 32)
    assert level is AttentionCGSupport.NEVER
    assert "'none'" in reason


# -- more rows than buffers have ----------------------------------------------------


def test_a_backend_makes_no_schedule_for_more_rows_than_requests(
    sdar: Engine, monkeypatch: pytest.MonkeyPatch
):
    ((group,),) = sdar.runner.attn_groups
    builder, asked = group.get_metadata_builder(0), []
    build = builder.build

    def note(prefix: int, common: Any, fast_build: bool = False) -> Any:
        asked.append((common.num_reqs, fast_build))
        return build(prefix, common, fast_build)

    monkeypatch.setattr(builder, "build", note)
    decode(sdar, alone(BlockCase(make_prompt(200), 16, ignore_eos=True)))
    assert (13, True) in asked
    assert {fast for rows, fast in asked if rows <= 8} == {False}


def test_a_dummy_batch_is_a_row_for_each_request(sdar: Engine):
    """As vLLM's own, whose graphs are replayed where another rank has work alone."""
    runner = sdar.runner
    batch = InputBatch.make_dummy(2, 2 * BLOCK, runner.input_buffers)
    rows = runner.model_state._attention.fill(
        None,
        batch,
        runner.block_tables.get_dummy_block_tables(2),
        is_whole=True,
    )
    assert rows.query_start_loc.tolist() == [0, 16, 32, 32, 32]
    assert rows.query_start_loc_cpu.tolist() == [0, 16, 32, 32, 32]
    assert rows.seq_lens.tolist() == [16, 16, 0, 0]
    assert rows.max_query_len == 16
    assert [len(table) for table in rows.block_tables] == [4]
