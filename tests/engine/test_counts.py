# SPDX-License-Identifier: Apache-2.0
"""What is computed, counted: forwards, their rows, and rows through lm_head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from engine.cases import Case, make_prompt
from engine.harness import Engine, params
from reference.procedures import CACHES
from tiers import fast
from vllm.v1.metrics.stats import PrefixCacheStats
from vllm.v1.request import RequestStatus

from vllm_dlm.metrics import work_done


@dataclass
class Counts:
    """One entry per forward."""

    rows: list[int] = field(default_factory=list)
    """Tokens that went through the network."""
    logits_rows: list[int] = field(default_factory=list)
    """Rows that went through lm_head."""


@contextmanager
def counting(engine: Engine) -> Iterator[Counts]:
    counts = Counts()
    model = engine.runner.model

    def note_rows(module, args, kwargs) -> None:
        counts.rows.append(kwargs["input_ids"].shape[0])

    def note_logits(module, args, kwargs, output) -> None:
        counts.logits_rows.append(output.shape[0])

    hooks = [
        model.register_forward_pre_hook(note_rows, with_kwargs=True),
        model.logits_processor.register_forward_hook(note_logits, with_kwargs=True),
    ]
    yield counts
    for hook in hooks:
        hook.remove()


def planned_rows(cache: str, prompt: int, canvas: int, block: int) -> list[int]:
    """Rows of every forward, one token a step."""
    rows = []
    for start in range(0, canvas, block):
        inner = {"none": prompt + canvas, "prefix": canvas - start, "dual": block}
        rows += [prompt + canvas] + [inner[cache]] * (block - 1)
    return rows


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    ("prompt", "canvas", "block"), fast((21, 48, 16), of=((1, 32, 32), (21, 48, 16)))
)
def test_rows_of_every_forward(
    engine: Engine, cache: str, prompt: int, canvas: int, block: int
):
    """The first forward has the canvas already: there is no prompt-only one."""
    case = Case(
        make_prompt(prompt),
        cache=cache,
        block=block,
        max_tokens=canvas,
        ignore_eos=True,
    )
    with counting(engine) as counts:
        (result,) = engine.run([case.prompt], case.params())
    assert counts.rows == planned_rows(cache, prompt, canvas, block)
    # lm_head sees masks only, of which there is one less in each step.
    assert counts.logits_rows == [*range(block, 0, -1)] * (canvas // block)
    assert result.forwards == canvas


@pytest.mark.parametrize("cache", fast("dual", of=CACHES))
def test_static_takes_its_steps(engine: Engine, cache: str):
    for block, steps, forwards in [(8, 24, 24), (16, 7, 6), (16, 48, 48), (16, 99, 48)]:
        case = Case(
            make_prompt(13),
            cache=cache,
            block=block,
            max_tokens=48,
            steps=steps,
            ignore_eos=True,
        )
        with counting(engine) as counts:
            (result,) = engine.run([case.prompt], case.params())
        assert result.forwards == len(counts.rows) == forwards


def test_rows_of_a_batch(engine: Engine):
    """Three requests side by side; lm_head sees the masks of each one's block."""
    cases = [
        Case(make_prompt(10), cache="dual", block=8, max_tokens=16, ignore_eos=True),
        Case(make_prompt(20), cache="prefix", block=16, max_tokens=16, ignore_eos=True),
        Case(make_prompt(30), cache="none", block=16, max_tokens=16, ignore_eos=True),
    ]
    with counting(engine) as counts:
        results = engine.run(
            [case.prompt for case in cases], [case.params() for case in cases]
        )
    each = [
        planned_rows(case.cache, len(case.prompt), 16, case.block) for case in cases
    ]
    assert counts.rows == [sum(rows) for rows in zip(*each, strict=True)]
    left = [8 - i % 8 + 2 * (16 - i) for i in range(16)]
    assert counts.logits_rows == left
    assert [result.forwards for result in results] == [16] * 3


def test_a_token_budget_makes_requests_take_turns(busy_engine: Engine):
    """Too many rows for one forward: whole requests sit a step out, none is cut."""
    cases = [
        Case(make_prompt(8 + i, i), max_tokens=12, ignore_eos=True) for i in range(8)
    ]
    alone = [busy_engine.run([case.prompt], case.params())[0] for case in cases]
    with counting(busy_engine) as counts:
        together = busy_engine.run(
            [case.prompt for case in cases], [case.params() for case in cases]
        )
    assert together == alone
    assert max(counts.rows) <= 128
    assert len(counts.rows) >= 8 * 12 // 3
    # Every forward is made of whole requests.
    sizes = [8 + i + 32 for i in range(8)]
    assert all(min(sizes) <= rows for rows in counts.rows)


def test_batch_of_one_token_requests(engine: Engine):
    """One forward for all, then they are gone."""
    with counting(engine) as counts:
        results = engine.run(
            [make_prompt(4 + i) for i in range(8)],
            params(1, dlm={"strategy": "static", "block_length": 4, "steps": 1}),
        )
    assert [result.forwards for result in results] == [1] * 8
    assert counts.rows == [sum(4 + i + 4 for i in range(8))]


def test_the_runner_counts_tokens_as_the_scheduler_does(engine: Engine):
    """Its row of token ids is as long as the context: a wrong count runs past it."""
    case = Case(make_prompt(6), block=32, max_tokens=250, ignore_eos=True, steps=64)
    engine.add(case.prompt, case.params())
    states = engine.runner.req_states
    while engine.busy:
        engine.step()
        for request_id, request in engine.scheduler.requests.items():
            slot = states.req_id_to_index[request_id]
            total = int(states.total_len.gpu[slot])
            # Behind the tokens there may be one number that is none.
            assert request.num_tokens <= total <= request.num_tokens + 1
            written = states.all_token_ids.gpu[slot, : request.num_tokens].tolist()
            assert written == list(request.all_token_ids)


def test_memory_by_default_is_enough_for_a_single_request(
    engines: Callable[..., Engine],
):
    """The KV cache is sized by what the requests can use: also by one."""
    engine = engines(
        max_num_seqs=1,
        max_model_len=1024,
        block_size=None,
        num_gpu_blocks_override=None,
    )
    case = Case(make_prompt(9), max_tokens=16, ignore_eos=True)
    (result,) = engine.run([case.prompt], case.params())
    assert len(result.tokens) == 16


def test_work_of_a_step_whose_requests_are_aborted(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    """It is counted with that step, not with another request's."""
    scheduler = engine.scheduler
    monkeypatch.setattr(scheduler, "log_stats", True)
    monkeypatch.setattr(
        scheduler.kv_cache_manager, "prefix_cache_stats", PrefixCacheStats()
    )
    monkeypatch.setattr(scheduler.kv_cache_manager, "log_stats", True)
    case = Case(make_prompt(7), block=16, max_tokens=16, ignore_eos=True)
    request_id = engine.add(case.prompt, case.params())
    engine.step()
    update, work = scheduler.update_from_output, []

    def abort_and_update(*args: Any) -> Any:
        # Where vLLM's engine takes an abort that came during the forward.
        scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
        outputs = update(*args)
        work.extend(work_done(of.scheduler_stats) for of in outputs.values())
        return outputs

    monkeypatch.setattr(scheduler, "update_from_output", abort_and_update)
    engine.step()
    assert work == [[7 + 16, 15, 0, 0]]
    monkeypatch.undo()
    engine.llm.llm_engine.abort_request([request_id])
    engine.flush()
