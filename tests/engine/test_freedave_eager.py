# SPDX-License-Identifier: Apache-2.0
"""FreeDave that goes on in the next blocks: the text of `static`, counted forwards."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from engine.block_engines import assert_only_final_pages_are_published
from engine.cases import make_prompt
from engine.freedave_cases import (
    FAMILIES,
    Asked,
    Serve,
    assert_nothing_is_lost,
    block_sample,
    branches_of,
    compare,
    forwards,
    one_by_one,
    room_in,
    run,
    serving,
    static,
)
from engine.harness import finished
from engine.withheld import withholding
from reference.freedave_procedures import freedave_blocks
from reference.network import TinyModel
from tiers import fast
from vllm.exceptions import VLLMValidationError

BD3LM = "Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm-v0.1"
"""Its blocks are counted from the prompt's end."""


@pytest.fixture(scope="module")
def serve(engines: Serve, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    return serving(engines, tmp_path_factory.getbasetemp() / "freedave")


def eager_sample(name: str) -> list[Asked]:
    return block_sample(name, (3, 4, 8, 12), eager=True)


@pytest.mark.parametrize("name", fast("SDAR-4B-Chat", of=("SDAR-4B-Chat", BD3LM)))
def test_the_text_of_static(serve: Serve, name: str):
    compare(serve(name), eager_sample(name))


COUNTED = [*itertools.product((False, True), ("SDAR-4B-Chat", BD3LM))]


@pytest.mark.parametrize(("eager", "name"), fast((True, "SDAR-4B-Chat"), of=COUNTED))
def test_forwards_are_those_of_the_rule(
    serve: Serve, tmp_path_factory: pytest.TempPathFactory, name: str, eager: bool
):
    engine = serve(name)
    _, block, _ = FAMILIES[name]
    folder = tmp_path_factory.getbasetemp() / "freedave" / name
    model = TinyModel.from_folder(folder)
    for one in eager_sample(name)[:6]:
        one = replace(one, eager=eager, temperature=0.0, ignore_eos=True)
        wanted = freedave_blocks(
            model,
            list(one.prompt),
            max_tokens=one.max_tokens,
            block_length=block,
            drafts=one.drafts,
            eager=eager,
            origin="prompt" if name == BD3LM else "start",
            max_model_len=engine.scheduler.max_model_len,
            room=room_in(engine),
        )
        (got,) = run(engine, [one], Asked.drafted)
        assert (got.tokens, got.forwards) == (wanted.tokens, wanted.forwards), one


def test_fewer_forwards_than_without(serve: Serve):
    """The first forward of a block has drafts, and the last one writes behind it."""
    engine = serve("SDAR-4B-Chat")
    eager = [replace(one, drafts=8) for one in eager_sample("SDAR-4B-Chat")]
    ahead = run(engine, eager, Asked.drafted)
    within = run(engine, [replace(one, eager=False) for one in eager], Asked.drafted)
    assert [one.tokens for one in ahead] == [one.tokens for one in within]
    assert forwards(ahead) < forwards(within)


@pytest.mark.parametrize("threshold", fast(0.3, of=(0.05, 0.3)))
def test_with_a_threshold_it_follows_threshold(serve: Serve, threshold: float):
    engine = serve("SDAR-4B-Chat")
    # Drawn tokens are those of `static`: with the numbers of one token per step.
    asked = [replace(one, temperature=0.0) for one in eager_sample("SDAR-4B-Chat")]
    wanted = one_by_one(
        engine,
        asked,
        lambda o: o.by("threshold", threshold=threshold, strict=False),
    )
    got = run(engine, asked, lambda o: o.drafted(threshold=threshold))
    assert_nothing_is_lost(asked, got, wanted)


def test_preempted_in_the_midst(serve: Serve):
    """What was written of the next block is written again."""
    engine, asked = serve("SDAR-4B-Chat"), eager_sample("SDAR-4B-Chat")
    asked = [replace(one, max_tokens=30, ignore_eos=True) for one in asked]
    wanted = one_by_one(engine, asked, static)
    ids = [engine.add(one.prompt, one.drafted()) for one in asked]

    def meddle(step: int) -> None:
        running = [request.request_id for request in engine.scheduler.running]
        if running and step % 2 and step < 30:
            engine.preempt(running[step % len(running)])

    done = engine.drive(meddle)
    for name, expected in zip(ids, wanted, strict=True):
        assert finished(done[name].outputs[0]).tokens == expected.tokens


@pytest.mark.slow
def test_in_an_asynchronous_engine(serve: Serve):
    """It sits steps out there, among requests that run ahead."""
    asked = eager_sample("SDAR-4B-Chat")
    others = [one.by("threshold", threshold=0.3) for one in asked]
    for other in others:
        other.logprobs, other.extra_args["dlm"]["step_map"] = None, False
    prompts = [one.prompt for one in asked for _ in range(2)]
    pairs = [
        one
        for pair in zip(map(Asked.drafted, asked), others, strict=True)
        for one in pair
    ]
    wanted = serve("SDAR-4B-Chat").run(prompts, pairs)
    ahead = serve("SDAR-4B-Chat", async_scheduling=True)
    with withholding(ahead) as steps:
        got = ahead.run(prompts, pairs)
    assert [one.tokens for one in got] == [one.tokens for one in wanted]
    assert steps.ahead > 0


def test_published_pages_are_final(serve: Serve):
    engine = serve("SDAR-4B-Chat")
    asked = Asked(make_prompt(75, seed=7), max_tokens=70, drafts=8, eager=True)
    name = engine.add(asked.prompt, asked.drafted())
    text: list[int] = []
    while engine.busy:
        for output in engine.step():
            assert output.request_id == name
            text = [*asked.prompt, *output.outputs[0].token_ids]
        assert_only_final_pages_are_published(engine)
    again = Asked(tuple(text), max_tokens=20, drafts=8, eager=True)
    output = engine.outputs([again.prompt], again.drafted())[0]
    assert output.num_cached_tokens > 0
    engine.llm.reset_prefix_cache()
    (fresh,) = run(engine, [again], static)
    assert finished(output.outputs[0]).tokens == fresh.tokens


def test_what_looks_at_every_step_keeps_drafts_in_the_block(serve: Serve):
    engine = serve("SDAR-4B-Chat")
    asked = Asked(make_prompt(9), max_tokens=24, drafts=8, eager=True)
    (wanted,) = run(engine, [asked], static)
    sampling = asked.drafted()
    sampling.extra_args["dlm"] |= {"eotp": "block", "eotp_threshold": 1.0}
    with branches_of(engine) as branches:
        (got,) = engine.run([asked.prompt], sampling)
    assert set(branches) == {1}
    assert (got.tokens, got.forwards) == (wanted.tokens, wanted.forwards)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Nemotron-Labs-Diffusion-8B", "decides the first token of a block alone"),
        ("Fast_dLLM_v2_7B", "decides the first token of a block alone"),
    ],
)
def test_leads_are_refused(serve: Serve, name: str, reason: str):
    asked = Asked(make_prompt(9), eager=True)
    with pytest.raises(VLLMValidationError, match=reason):
        run(serve(name), [asked], Asked.drafted)
