# SPDX-License-Identifier: Apache-2.0
"""Block-causal models on a real engine: what is computed, in which forward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine.block_cases import RULES, BlockCase, expect, run
from engine.block_engines import (
    BLOCK,
    BlockEngines,
    recording,
    rows_of,
)
from engine.cases import assert_equal, assert_same_tokens, make_prompt
from engine.harness import Engine, finished
from engine.test_counts import counting
from reference.network import TinyModel, block_causal
from tiers import fast
from vllm.sampling_params import RequestOutputKind


@pytest.fixture(scope="module")
def sdar(engines: Callable[..., Engine], tmp_path_factory) -> BlockEngines:
    return BlockEngines(engines, tmp_path_factory.getbasetemp(), "SDAR-4B-Chat-b16")


@pytest.fixture(scope="module")
def fast_dllm(engines: Callable[..., Engine], tmp_path_factory) -> BlockEngines:
    """A model whose blocks begin with a seed; parts of 8 are decided together."""
    return BlockEngines(engines, tmp_path_factory.getbasetemp(), "Fast_dLLM_v2_7B")


@pytest.fixture(params=fast("fast_dllm", of=("sdar", "fast_dllm")))
def model(request: pytest.FixtureRequest) -> BlockEngines:
    """Each kind of model in turn."""
    return request.getfixturevalue(request.param)


def one_a_step(prompt: int, max_tokens: int, seed: int = 0) -> BlockCase:
    """One token per forward, to the last."""
    return BlockCase(
        make_prompt(prompt, seed), max_tokens, rule="sequential", ignore_eos=True
    )


def alone(engine: Engine, case: BlockCase) -> tuple[list[tuple[int, int]], list[int]]:
    """Rows of each forward of a request alone, and rows through lm_head."""
    engine.llm.reset_prefix_cache()
    with recording(engine) as forwards, counting(engine) as counts:
        name = engine.add(case.prompt, case.params())
        while engine.busy:
            engine.step()
    rows = rows_of(forwards, name)
    assert counts.rows == [end - start for start, end in rows]
    return rows, counts.logits_rows


def masks_left(*blocks: int) -> list[int]:
    """Rows through lm_head of each step, where a step writes one token."""
    return [left for masks in blocks for left in range(masks, 0, -1)]


# -- counts --------------------------------------------------------------------


def test_rows_of_every_forward(sdar: BlockEngines):
    """One token a step, blocks [32, 48), [48, 64), [64, 80); a prompt of 40."""
    rows, logits = alone(sdar(), one_a_step(40, 40))
    assert rows == [
        (0, 48),  # the prompt and the rest of its last block
        *[(32, 48)] * 7,
        (32, 64),  # the finished block for good, and the next one
        *[(48, 64)] * 15,
        (48, 80),
        *[(64, 80)] * 15,  # nobody needs the last block's KV
    ]
    assert logits == masks_left(8, 16, 16)


def test_rows_of_every_forward_with_seeds(fast_dllm: BlockEngines):
    rows, logits = alone(fast_dllm(), one_a_step(40, 40))
    assert rows == [
        (0, 48),
        *[(32, 48)] * 7,
        (32, 48),  # the finished block for good: its last row predicts the seed
        *[(48, 64)] * 15,
        (48, 64),
        *[(64, 80)] * 15,
    ]
    # A seed is one row; then come the masks of one sub-block after the other.
    assert logits == [*masks_left(8), *2 * (1, *masks_left(7, 8))]


def test_a_prompt_of_whole_blocks_is_seeded_by_its_last_row(fast_dllm: BlockEngines):
    rows, logits = alone(fast_dllm(), one_a_step(32, 17))
    assert rows == [(0, 32), *[(32, 48)] * 15, (32, 48)]
    assert logits == [1, *masks_left(7, 8), 1]


@pytest.mark.parametrize(("steps", "forwards"), [(1, 3), (4, 10), (8, 20), (16, 40)])
def test_forwards_are_denoise_steps(sdar: BlockEngines, steps: int, forwards: int):
    """8 + 16 + 16 tokens; none is spent on writing a finished block's KV."""
    case = BlockCase(
        make_prompt(40), 40, rule="static", steps_per_block=steps, ignore_eos=True
    )
    with counting(sdar()) as counts:
        (result,) = run(sdar(), [case])
    assert result.forwards == len(counts.rows) == forwards


def test_a_long_prompt_is_computed_in_chunks(sdar: BlockEngines):
    """4,096 tokens in forwards of 2,048, then one for each denoise step."""
    engine = sdar(
        max_model_len=4352, max_num_batched_tokens=2048, num_gpu_blocks_override=300
    )
    case = one_a_step(4096, 17)
    rows, logits = alone(engine, case)
    assert rows == [
        (0, 2048),
        (2048, 4096),
        *[(4096, 4112)] * 16,
        (4096, 4128),
    ]
    # Chunks that decide nothing do not go through lm_head at all.
    assert logits == [*masks_left(BLOCK), BLOCK]
    (result,) = run(engine, [case])
    assert result.forwards == 17


def test_chunks_end_where_blocks_end(sdar: BlockEngines):
    """Forwards of 2 blocks; a prompt of 150 with its active block at [144, 160)."""
    engine = sdar(max_num_batched_tokens=2 * BLOCK)
    rows, logits = alone(engine, one_a_step(150, 1))
    assert rows == [(0, 32), (32, 64), (64, 96), (96, 128), (128, 160)]
    assert logits == [160 - 150]
    rows, _ = alone(engine, one_a_step(161, 1))
    assert rows[-2:] == [(128, 160), (160, 176)]


# -- chunks ----------------------------------------------------------------------


BUDGETS = (2 * BLOCK, 5 * BLOCK - 3, 2048)


@pytest.mark.parametrize("budget", fast(BUDGETS[0], of=BUDGETS))
def test_chunked_prompts_equal_the_oracle(model: BlockEngines, budget: int):
    """All rules in one batch; prompts of a few tokens and of many forwards."""
    engine = model(max_num_batched_tokens=budget)
    engine.llm.reset_prefix_cache()
    lengths = (1, 15, 16, 17, 33, 64, 79, 128, 200)
    rules = [*RULES] * 3
    cases = [
        BlockCase(
            make_prompt(length, 5),
            max_tokens=9 + length % 24,
            rule=rules[number],
            steps_per_block=(None, 4, 5)[number % 3],
            ignore_eos=number % 2 == 0,
        )
        for number, length in enumerate(lengths)
    ]
    wanted = [expect(case, model.oracle, engine) for case in cases]
    with recording(engine) as forwards:
        got = run(engine, cases)
    assert_equal(cases, got, wanted)
    for forward in forwards:
        parts = forward.values()
        assert sum(part.end - part.start for part in parts) <= budget
        assert all(part.end % BLOCK == 0 for part in parts)
    chunks = [part for forward in forwards for part in forward.values()]
    decided = sum(part.canvas > 0 for part in chunks)
    assert decided == sum(result.forwards for result in got)
    assert (decided < len(chunks)) == (budget < 2048)


def test_a_prompt_is_computed_while_others_denoise(model: BlockEngines):
    """Its chunks take what the denoising requests leave of a forward."""
    engine = model(max_num_batched_tokens=5 * BLOCK - 3)
    engine.llm.reset_prefix_cache()
    early = [one_a_step(20, 40), one_a_step(33, 30, seed=1)]
    late = BlockCase(make_prompt(220), 20)
    cases = [*early, late]
    wanted = [expect(case, model.oracle, engine) for case in cases]
    with recording(engine) as forwards, counting(engine) as counts:
        ids = [engine.add(case.prompt, case.params()) for case in early]
        tokens = {}
        while engine.busy:
            if len(forwards) == 5:
                ids.append(engine.add(late.prompt, late.params()))
            for output in engine.step():
                tokens[output.request_id] = list(output.outputs[0].token_ids)
    assert_same_tokens([tokens[name] for name in ids], wanted)
    mixed = [
        forward
        for forward in forwards
        if ids[2] in forward and not forward[ids[2]].canvas and len(forward) == 3
    ]
    assert len(mixed) >= 4
    # Who computes a part of its prompt needs no logits; the others read what they do
    # alone.
    reads = {
        name: iter(alone(engine, case)[1])
        for name, case in zip(ids, cases, strict=True)
    }
    assert counts.logits_rows == [
        sum(next(reads[name]) for name, part in forward.items() if part.canvas > 0)
        for forward in forwards
    ]


# -- lengths -------------------------------------------------------------------------


def test_texts_end_with_the_context(model: BlockEngines):
    """250 positions: the last block is [240, 250)."""
    engine = model()
    cases = [
        BlockCase(
            make_prompt(250 - left, left),
            max_tokens=left,
            rule=list(RULES)[left % len(RULES)],
            ignore_eos=True,
        )
        for left in (1, 2, 9, 10, 11, 26, 30)
    ]
    wanted = [expect(case, model.oracle, engine) for case in cases]
    got = run(engine, cases)
    assert_equal(cases, got, wanted)
    for case, result in zip(cases, got, strict=True):
        assert len(result.tokens) == case.max_tokens
        assert result.output.finish_reason == "length"


def test_text_lengths(model: BlockEngines):
    """One token, ends inside a block and at its end, prompts shorter than a block."""
    engine = model()
    cases = [
        BlockCase(
            make_prompt(prompt, most),
            max_tokens=most,
            rule=rule,
            ignore_eos=prompt % 2 == 0,
        )
        for prompt in (1, 13, 16, 32)
        for most in (1, 16, 19)
        for rule in ("threshold", "static")
    ]
    wanted = [expect(case, model.oracle, engine) for case in cases]
    assert_equal(cases, run(engine, cases), wanted)
    ended = [expected for expected in wanted if model.oracle.eos_id in expected.tokens]
    assert len(ended) >= 2


def test_the_end_of_a_text_is_ignored_on_demand(sdar: BlockEngines):
    """The same prompts, some of which end early."""
    engine = sdar()
    prompts = [make_prompt(length, 3) for length in range(1, 25)]
    early = 0
    for ignore_eos in (False, True):
        cases = [BlockCase(prompt, 50, ignore_eos=ignore_eos) for prompt in prompts]
        got = run(engine, cases)
        if ignore_eos:
            assert {len(result.tokens) for result in got} == {50}
        else:
            for result in got:
                stopped = result.output.finish_reason == "stop"
                early += stopped
                assert (result.tokens[-1] == sdar.oracle.eos_id) == stopped
                assert sdar.oracle.eos_id not in result.tokens[:-1]
    assert early >= 2


# -- what a client sees ---------------------------------------------------------------


def test_streamed_pieces_make_up_the_text(model: BlockEngines):
    engine = model(max_num_batched_tokens=5 * BLOCK - 3)
    cases = [
        BlockCase(make_prompt(11 + 17 * number, 8), 21, rule=rule, ignore_eos=True)
        for number, rule in enumerate(RULES)
    ]
    wanted = [expect(case, model.oracle, engine) for case in cases]
    sampling = [case.params(output_kind=RequestOutputKind.DELTA) for case in cases]
    pieces: dict[str, list[list[int]]] = {
        engine.add(case.prompt, one): []
        for case, one in zip(cases, sampling, strict=True)
    }
    while engine.busy:
        for output in engine.step():
            pieces[output.request_id].append(list(output.outputs[0].token_ids))
    assert_same_tokens([sum(parts, []) for parts in pieces.values()], wanted)
    assert all(part for parts in pieces.values() for part in parts)
    assert sum(len(parts) for parts in pieces.values()) >= 3 * len(cases)


def test_logprobs_are_those_of_the_step_that_wrote_a_token(model: BlockEngines):
    """Also while another prompt is computed in chunks."""
    engine = model(max_num_batched_tokens=5 * BLOCK - 3)
    engine.llm.reset_prefix_cache()
    asks = [one_a_step(20, 30), one_a_step(50, 20, seed=1)]
    other = BlockCase(make_prompt(240), 10)
    ids = [engine.add(case.prompt, case.params(logprobs=2)) for case in asks]
    results = {}
    with recording(engine) as forwards:
        late = engine.add(other.prompt, other.params())
        while engine.busy:
            for output in engine.step():
                if output.finished:
                    results[output.request_id] = finished(output.outputs[0])
    chunks = [f for f in forwards if late in f and not f[late].canvas]
    assert sum(ids[0] in f and f[ids[0]].canvas > 0 for f in chunks) >= 3
    assert results[late].output.logprobs is None
    for name, case in zip(ids, asks, strict=True):
        assert_same_tokens([results[name].tokens], [expect(case, model.oracle, engine)])
        for place, token in enumerate(results[name].tokens):
            text = [*case.prompt, *results[name].tokens[:place]]
            wanted = next_token_scores(model.oracle, text, engine)
            entry = results[name].output.logprobs[place]
            assert set(entry) == set(wanted.topk(2).indices.tolist())
            assert entry[token].rank == 1
            for i, one in entry.items():
                assert one.logprob == pytest.approx(float(wanted[i]), abs=1e-3)


def next_token_scores(
    oracle: TinyModel, text: list[int], engine: Engine
) -> torch.Tensor:
    """Log-probabilities [V] of the token behind `text`, the rest of its block masked.

    Where a seed is due, it is predicted before there is a block.
    """
    shift = engine.scheduler.dlm_defaults.shift
    place = len(text)
    row = list(text)
    if not shift or place % BLOCK:
        row += [oracle.mask_id] * (BLOCK - place % BLOCK)
    logits = oracle.forward(row, visible=block_causal(len(row), BLOCK))[place - shift]
    logits[oracle.mask_id] = -torch.inf
    return logits.log_softmax(dim=0)
