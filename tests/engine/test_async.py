# SPDX-License-Identifier: Apache-2.0
"""Asynchronous scheduling: a step is launched before the last one's outcome."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from engine.block_cases import BlockCase
from engine.block_engines import BLOCK, BlockEngines
from engine.cases import RULES, Case, make_prompt
from engine.harness import Engine, Finished, drive, finished, params
from engine.page_ledger import watching
from engine.test_commit import CASES, finished_blocks
from engine.test_counts import counting
from engine.test_no_waits import Waits
from engine.test_own_canvas import make_canvas
from engine.withheld import withholding
from tiers import fast
from vllm import LLM, SamplingParams

Request = tuple[tuple[int, ...], SamplingParams]


@pytest.fixture(scope="module")
def ahead(engines: Callable[..., Engine]) -> Engine:
    """As `engine`, asynchronous."""
    return engines(async_scheduling=True)


def mixed_requests(count: int, shift: int = 0) -> list[Request]:
    """Requests by every rule; a few of them need the host after each step."""
    requests = []
    for number in range(count):
        case = Case(
            make_prompt(3 + 7 * number % 50, number),
            rule=RULES[(number + shift) % len(RULES)],
            cache=("none", "none", "none", "dual", "window")[number % 5],
            block=(8, 16, 32)[number % 3],
            max_tokens=17 + 5 * number % 48,
            ignore_eos=number % 2 == 0,
            seed=number,
        )
        more = {"temperature": 0.9} if number % 4 == 3 else {}
        if number % 11 == 5:
            more |= {"logprobs": 2}
        if number % 11 == 7:
            more |= {"logit_bias": {number: 3.0}}
        requests.append((case.prompt, case.params(**more)))
    return requests


def same(got: Sequence[Finished], wanted: Sequence[Finished]) -> None:
    assert [one.tokens for one in got] == [one.tokens for one in wanted]


@pytest.mark.parametrize("count", fast(10, of=(10, len(RULES))))
def test_texts_are_those_of_a_synchronous_engine(
    engine: Engine, ahead: Engine, count: int
):
    """Together: eight at a time, all kinds in a batch; and one by one."""
    requests = mixed_requests(count)
    wanted = engine.run(*zip(*requests, strict=True))
    with withholding(ahead) as steps:
        got = ahead.run(*zip(*requests, strict=True))
    same(got, wanted)
    assert steps.ahead > steps.launched // 2
    with withholding(ahead):
        alone = [ahead.run([prompt], one)[0] for prompt, one in requests[::10]]
    same(alone, wanted[::10])


@pytest.mark.parametrize(
    ("rule", "launched_behind"), [("static/low_confidence", 0), ("threshold", 1)]
)
def test_forwards_with_full_attention(
    engine: Engine, ahead: Engine, rule: str, launched_behind: int
):
    """As many as without; one is dropped, unless it is known which step is the last."""
    case = Case(make_prompt(9), rule=rule, block=16, max_tokens=48, ignore_eos=True)
    (wanted,) = engine.run([case.prompt], case.params())
    with withholding(ahead) as steps, counting(ahead) as counts:
        name = ahead.add(case.prompt, case.params())
        done = drive(ahead, lambda step: None)
    assert done[name] == wanted
    assert steps.of(name) == [(0, 9 + 48)] * (wanted.forwards + launched_behind)
    # A row for each position of the block: which of them are masked is not known.
    assert counts.logits_rows == [16] * len(steps.rows)


def test_nothing_waits_for_the_device(ahead: Engine):
    """Two requests, one of them drawn at a temperature, and one that sits out."""
    cases = [Case(make_prompt(9 + i, i), seed=i, ignore_eos=True) for i in range(3)]
    more: list[dict[str, Any]] = [{}, {"temperature": 0.9}, {"logit_bias": {5: 1.0}}]
    with withholding(ahead):
        for case, options in zip(cases, more, strict=True):
            ahead.add(case.prompt, case.params(**options))
        ahead.step()  # what is made of a request once
        with Waits() as waits:
            for _ in range(8):
                ahead.step()
        while ahead.busy:
            ahead.step()
    assert not waits.seen


def test_a_cut_makes_what_was_launched_void(engine: Engine, ahead: Engine):
    """And the text goes on with the rows that are left."""
    cut = {"strategy": "threshold", "eotp": "block", "eotp_threshold": 0.02}
    requests = [
        (make_prompt(5 + i, i), params(50, dlm=cut | {"block_length": 8}))
        for i in range(8)
    ]
    wanted = engine.run(*zip(*requests, strict=True))
    with withholding(ahead) as steps:
        got = ahead.run(*zip(*requests, strict=True))
    same(got, wanted)
    more = [a.forwards - b.forwards for a, b in zip(got, wanted, strict=True)]
    assert sum(more) > 0 and min(more) == 0
    assert steps.ahead > 0


def test_preempted_and_aborted_with_a_step_in_flight(engine: Engine, ahead: Engine):
    """What is in flight of a preempted request is dropped; so is an aborted one's."""
    requests = [one for one in mixed_requests(12, shift=3) if one[1].max_tokens > 20]
    wanted = engine.run(*zip(*requests, strict=True))
    preempted = set()
    longest = max(range(8), key=lambda number: requests[number][1].max_tokens)

    def meddle(step: int) -> None:
        if step == 3:
            ahead.abort(names[longest])
        running = ahead.scheduler.running
        if step % 3 == 1 and step < 30 and running:
            request = running[step % len(running)]
            preempted.add(request.num_in_flight_tokens > 0)
            ahead.preempt(request.request_id)

    with withholding(ahead):
        names = [ahead.add(*one) for one in requests]
        done = drive(ahead, meddle)
    assert True in preempted
    assert done.keys() == {*names} - {names[longest]}
    del names[longest], wanted[longest]
    same([done[name] for name in names], wanted)


def block_requests() -> list[Request]:
    """Requests of models that reuse blocks; some need the host after each step."""
    requests = [(case.prompt, case.params()) for case in CASES]
    for number, case in enumerate(CASES):
        more: dict[str, Any] = {"temperature": 0.8, "seed": number}
        if number % 4 == 1:
            more = {"logprobs": 1}
        if number % 4 == 3:
            more = {"min_tokens": min(case.max_tokens, 5)}
        requests.append((case.prompt[::-1] + case.prompt, case.params(**more)))
    cut = {"strategy": "threshold", "eotp": "token", "eotp_threshold": 0.02}
    requests += [(make_prompt(9 + i, i), params(60, dlm=cut)) for i in range(4)]
    return requests


MODELS = ("SDAR-4B-Chat-b16", "Fast_dLLM_v2_7B", "Nemotron-Labs-Diffusion-3B")


@pytest.fixture(scope="module", params=fast(MODELS[0], of=MODELS))
def model(
    engines: Callable[..., Engine], tmp_path_factory, request: pytest.FixtureRequest
) -> BlockEngines:
    return BlockEngines(engines, tmp_path_factory.getbasetemp(), request.param)


def test_blocks(model: BlockEngines):
    """A finished block takes a forward of its own where no lead is predicted by it."""
    options = {"block_length": BLOCK}
    usual, ahead = model(dlm=options), model(dlm=options, async_scheduling=True)
    requests = block_requests()
    wanted = usual.run(*zip(*requests, strict=True))
    with withholding(ahead) as steps:
        got = ahead.run(*zip(*requests, strict=True))
    same(got, wanted)
    assert steps.ahead > steps.launched // 2
    with withholding(ahead):
        alone = [ahead.run([prompt], one)[0] for prompt, one in requests[::14]]
    same(alone, wanted[::14])

    more = [a.forwards - u.forwards for a, u in zip(got, wanted, strict=True)]
    has_leads = ahead.scheduler.dlm_defaults.leads_blocks
    expected = [
        0
        if has_leads or case.rule in BY_COUNT
        else finished_blocks(case, len(one.tokens))
        for case, one in zip(CASES, wanted, strict=False)
    ]
    assert more[: len(CASES)] == expected


BY_COUNT = ("static", "sequential")
"""Rules of which it is known when they finish a block."""


def test_rows_of_a_block_model(engines: Callable[..., Engine], tmp_path_factory):
    """A block is guessed to go on; where its end is known, two are computed at once."""
    sdar = BlockEngines(engines, tmp_path_factory.getbasetemp(), MODELS[0])
    ahead = sdar(dlm={"block_length": BLOCK}, async_scheduling=True)
    found = {}
    for rule in ("sequential", "factor"):
        case = BlockCase(make_prompt(20), 40, rule=rule, ignore_eos=True)
        ahead.llm.reset_prefix_cache()
        with withholding(ahead) as steps:
            name = ahead.add(case.prompt, case.params())
            while ahead.busy:
                ahead.step()
        found[rule] = steps.of(name)
    assert found["sequential"] == (
        [(0, 32)]
        + 11 * [(16, 32)]
        + [(16, 48)]
        + 15 * [(32, 48)]
        + [(32, 64)]
        # The text ends inside the block: one is launched behind its end.
        + 12 * [(48, 64)]
    )
    kinds = list(dict.fromkeys(found["factor"]))
    assert kinds == [(0, 32), (16, 32), (32, 48), (48, 64)]


def test_pages_of_finished_blocks_alone_are_found(model: BlockEngines):
    """The same prompts again and again, while their blocks are decoded."""
    options = {"block_length": BLOCK}
    usual, ahead = model(dlm=options), model(dlm=options, async_scheduling=True)
    prompts = [make_prompt(70, number % 3)[: 40 + number] for number in range(9)]
    requests = [
        (prompt, BlockCase(prompt, 40, rule=rule, ignore_eos=True).params())
        for prompt, rule in zip(
            prompts, ["threshold", "static", "joint"] * 3, strict=True
        )
    ]
    wanted = usual.run(*zip(*requests, strict=True))
    with watching(ahead) as ledger, withholding(ahead):
        got = ahead.run(*zip(*requests, strict=True))
    same(got, wanted)
    assert ledger.found


def test_two_blocks_in_every_step(engines: Callable[..., Engine], tmp_path_factory):
    """No forward is lost, and each has twice the rows."""
    sdar = BlockEngines(engines, tmp_path_factory.getbasetemp(), MODELS[0])
    options = {"block_length": BLOCK}
    usual = sdar(dlm=options)
    ahead = sdar(dlm=options | {"async_blocks": 2}, async_scheduling=True)
    requests = block_requests()[: len(CASES) + 4]
    wanted = usual.run(*zip(*requests, strict=True))
    with withholding(ahead) as steps:
        got = ahead.run(*zip(*requests, strict=True))
    assert [one.tokens for one in got] == [one.tokens for one in wanted]
    known = slice(0, len(CASES))  # who needs the host computes one block
    assert [one.forwards for one in got[known]] == [
        one.forwards for one in wanted[known]
    ]
    widths = {end - start for rows in steps.rows for start, end in rows.values()}
    assert 2 * BLOCK in widths


REFUSED = [
    ({"cache": "dual"}, "--dlm-cache none"),
    ({"strategy": "klass"}, "--dlm-strategy"),
    ({"trajectory_dir": "."}, "--dlm-trajectory-dir"),
    ({"strategy": "learn2pd"}, "--no-dlm-online-learning"),
    ({"reference_exact": True}, "--dlm-reference-exact"),
]


@pytest.mark.parametrize(("dlm", "remedy"), REFUSED)
def test_what_cannot_be_scheduled_ahead_is_refused(checkpoint, dlm, remedy):
    with pytest.raises(ValueError, match=f"--async-scheduling has no effect.*{remedy}"):
        LLM(str(checkpoint), additional_config={"dlm": dlm}, async_scheduling=True)


@pytest.mark.slow
def test_short_of_pages_and_of_rows(engines: Callable[..., Engine]):
    """Requests take turns, and lose their pages while a step of theirs is computed."""
    options: dict[str, Any] = {
        "dlm": {"max_canvas": 32},
        "max_model_len": 128,
        "num_gpu_blocks_override": 8,
        "max_num_batched_tokens": 128,
    }
    usual, ahead = engines(**options), engines(**options, async_scheduling=True)
    requests = []
    for number in range(8):
        dlm = {"strategy": ("threshold", "static")[number % 2], "block_length": 16}
        if number % 3 == 2:
            dlm["cache"] = "dual"
        one = params(60 + number, dlm=dlm, ignore_eos=True)
        requests.append((make_prompt(3 + 5 * number, number), one))
    wanted = usual.run(*zip(*requests, strict=True))
    with withholding(ahead):
        outputs, _ = ahead.run_short_of_pages(*zip(*requests, strict=True))
    same([finished(one.outputs[0]) for one in outputs], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS[:2], indirect=True)
def test_block_models_short_of_pages(model: BlockEngines):
    options: dict[str, Any] = {"dlm": {"block_length": BLOCK}}
    usual = model(**options)
    ahead = model(**options, num_gpu_blocks_override=14, async_scheduling=True)
    requests = []
    for number in range(8):
        case = BlockCase(
            make_prompt(3 + 9 * number, number),
            90,
            rule=("threshold", "static", "joint")[number % 3],
            ignore_eos=True,
        )
        more = {"logprobs": 1} if number % 4 == 3 else {}
        requests.append((case.prompt, case.params(**more)))
    wanted = usual.run(*zip(*requests, strict=True))
    with withholding(ahead):
        outputs, _ = ahead.run_short_of_pages(*zip(*requests, strict=True))
    same([finished(one.outputs[0]) for one in outputs], wanted)


@pytest.mark.slow
def test_compiled_with_full_attention(engine: Engine, engines: Callable[..., Engine]):
    """What completes a plan on the device is compiled with the steps."""
    ahead = engines(dlm={"compile": "all"}, async_scheduling=True)
    for rule in ("static/low_confidence", "threshold"):
        cases = [
            Case(make_prompt(5 + 9 * i, i), rule=rule, max_tokens=20 + 9 * i, seed=i)
            for i in range(6)
        ]
        requests = [(case.prompt, case.params()) for case in cases]
        wanted = engine.run(*zip(*requests, strict=True))
        with withholding(ahead):
            same(ahead.run(*zip(*requests, strict=True)), wanted)
            same([ahead.run([prompt], one)[0] for prompt, one in requests], wanted)
    groups = ahead.runner.sampler.groups._groups.values()
    assert all(group.function.settled != group.function.settle for group in groups)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS[1:2], indirect=True)
def test_compiled_block_models(model: BlockEngines):
    options = {"block_length": BLOCK}
    usual = model(dlm=options)
    ahead = model(dlm=options | {"compile": "all"}, async_scheduling=True)
    requests = [(case.prompt, case.params()) for case in CASES]
    wanted = usual.run(*zip(*requests, strict=True))
    with withholding(ahead):
        same(ahead.run(*zip(*requests, strict=True)), wanted)


def test_requests_of_other_caches_sit_out(engine: Engine, ahead: Engine):
    """One step is launched behind the other, but never two of one request."""
    cases = [
        Case(make_prompt(9), rule="threshold", cache="dual", ignore_eos=True),
        Case(make_prompt(8), max_tokens=64, ignore_eos=True),
        Case(make_prompt(7), rule="klass", ignore_eos=True),
    ]
    requests = [(case.prompt, case.params()) for case in cases]
    wanted = engine.run(*zip(*requests, strict=True))
    with withholding(ahead) as steps:
        names = [ahead.add(*one) for one in requests]
        done = drive(ahead, lambda step: None)
    assert [done[name].tokens for name in names] == [one.tokens for one in wanted]
    for name in names:
        where = [number for number, rows in enumerate(steps.rows) if name in rows]
        gaps = {b - a for a, b in zip(where, where[1:], strict=False)}
        assert gaps == ({1} if name == names[1] else {2})


def test_a_cpu_schedules_synchronously_unless_asked(engine: Engine, ahead: Engine):
    found = [
        one.llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        for one in (engine, ahead)
    ]
    assert found == [False, True]


@pytest.mark.slow
def test_requests_with_a_canvas_among_others(engine: Engine, ahead: Engine):
    """They sit out while a forward of theirs is on its way; others run ahead."""
    requests = mixed_requests(6, shift=3)
    for number, kind in enumerate(("runs", "gap", "scattered")):
        case = Case(
            make_prompt(8 + number, number),
            block=8,
            max_tokens=44,
            canvas=make_canvas(44, kind, number),
        )
        requests.insert(2 * number, (case.prompt, case.params()))
    wanted = engine.run(*zip(*requests, strict=True))
    with withholding(ahead):
        same(ahead.run(*zip(*requests, strict=True)), wanted)
