# SPDX-License-Identifier: Apache-2.0
"""LinearSpec on a real engine: a causal model's own text, two forwards a round."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine.block_engines import assert_only_final_pages_are_published
from engine.cases import make_prompt
from engine.freedave_cases import FAMILIES, Serve, serving
from engine.harness import Engine, finished, params
from engine.test_constrained import Wanted, run
from engine.withheld import withholding
from reference.linear_spec import linear_spec, one_by_one, read
from reference.network import TinyModel
from tiers import fast
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_dlm.admission.structured import vocabulary_of
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.constraints.automaton import compile_pattern
from vllm_dlm.constraints.paths import Completions, Graph

NEMOTRON = "Nemotron-Labs-Diffusion-8B"
_, BLOCK, _ = FAMILIES[NEMOTRON]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "freedave"


@pytest.fixture(scope="module")
def serve(engines: Serve, folder: Path) -> Serve:
    return serving(engines, folder)


@pytest.fixture(scope="module")
def engine(serve: Serve) -> Engine:
    return serve(NEMOTRON)


@pytest.fixture(scope="module")
def oracle(engine: Engine, folder: Path) -> TinyModel:
    return TinyModel.from_folder(folder / NEMOTRON)


def by(max_tokens: int, **options) -> SamplingParams:
    dlm = {"strategy": "linear_spec"} | options.pop("dlm", {})
    return params(max_tokens, dlm=dlm, **options)


def sample(count: int = 8) -> list[tuple[tuple[int, ...], int]]:
    """Prompts, and how many tokens are wanted of each."""
    source = random.Random(5)
    return [
        (make_prompt(source.randint(1, 70), seed=number), source.randint(1, 45))
        for number in range(count)
    ]


@pytest.mark.parametrize("count", fast(4, of=(4, 8)))
def test_text_and_forwards(engine: Engine, oracle: TinyModel, count: int):
    """As the model writes one by one; together, alone, and among others."""
    prompts, lengths = zip(*sample(count), strict=True)
    # Of few tokens, so that drafts are right now and then.
    allowed = [[5, 6], [7, 8, 9], [], [3]] * (count // 4)
    wanted = [
        linear_spec(oracle, list(prompt), length, BLOCK, allowed=few)
        for prompt, length, few in zip(prompts, lengths, allowed, strict=True)
    ]
    for prompt, length, few, (tokens, _) in zip(
        prompts, lengths, allowed, wanted, strict=True
    ):
        assert tokens == one_by_one(oracle, list(prompt), length, allowed=few)
    assert sum(f for _, f in wanted) < 0.8 * sum(1 + 2 * (n - 1) for n in lengths)
    asked = [
        by(length, ignore_eos=True, allowed_token_ids=few or None)
        for length, few in zip(lengths, allowed, strict=True)
    ]
    together = engine.run(prompts, asked)
    assert [(one.tokens, one.forwards) for one in together] == wanted
    alone = [engine.run(prompts[i : i + 1], asked[i])[0] for i in range(2)]
    assert alone == together[:2]

    others = [
        params(length, dlm={"strategy": strategy}, ignore_eos=True)
        for length, strategy in zip(
            lengths, itertools.cycle(("freedave", "threshold")), strict=False
        )
    ]
    solo = [engine.run([p], o)[0] for p, o in zip(prompts, others, strict=True)]
    mixed = engine.run(
        [prompt for prompt in prompts for _ in range(2)],
        [one for pair in zip(asked, others, strict=True) for one in pair],
    )
    assert mixed[::2] == together
    assert [one.tokens for one in mixed[1::2]] == [one.tokens for one in solo]


def test_ends_with_the_text(engine: Engine, oracle: TinyModel):
    eos_ids, ended = {oracle.eos_id}, 0
    for prompt, _ in sample(2):
        tokens, forwards = linear_spec(oracle, list(prompt), 30, BLOCK, eos_ids)
        (got,) = engine.run([prompt], by(30))
        assert (got.tokens, got.forwards) == (tokens, forwards)
        ended += tokens[-1] in eos_ids
    assert ended


def test_drawn_tokens_are_those_of_one_by_one(engine: Engine):
    """Each token in a request of its own, from the same seed."""
    prompt, count = make_prompt(11, seed=3), 12
    options = {"temperature": 0.8, "seed": 7, "allowed_token_ids": [5, 6, 7]}
    drawn = by(count, ignore_eos=True, **options)
    (got,) = engine.run([prompt], drawn)
    text: list[int] = []
    for _ in range(count):
        one = by(1, ignore_eos=True, **options)
        text += engine.run([[*prompt, *text]], one)[0].tokens
    assert got.tokens == text
    assert got.forwards < 1 + 2 * (count - 1), "no draft was right"


def test_held_to_a_pattern(engine: Engine, oracle: TinyModel):
    """As a model is that writes one by one: the best token that leaves a match."""
    model_config = engine.scheduler.vllm_config.model_config
    ends = ModelDefaults.from_hf_config(model_config.hf_config).stop_ids
    expressions = [r"(t\d)+t99", r"(t[1-3]\d?){9}", r"t(5|6|7)+\d(t\dt1)*"]
    requests = [
        Wanted(list(prompt), by(length + 12), expression)
        for (prompt, length), expression in zip(sample(3), expressions, strict=True)
    ]
    together = run(engine, requests)
    for request, result in zip(requests, together, strict=True):
        assert request.pattern is not None
        machine = compile_pattern(
            request.pattern, vocabulary_of(model_config), ends, [oracle.mask_id]
        )
        length = request.sampling.max_tokens or 0
        possible = Completions(machine, Graph.of(machine), length)
        state, row = machine.start, list(request.prompt)
        for position in range(1, length + 1):
            follows = np.where(
                machine.class_of >= 0, machine.transitions[state, machine.class_of], -1
            )
            (left,) = ((follows >= 0) & possible.at(position)[follows]).nonzero()
            row += read(oracle, row, len(row) - 1, left.tolist())
            state = follows[row[-1]]
            if row[-1] in ends:
                break
        assert result.tokens == row[len(request.prompt) :]
    hot = [
        replace(one, sampling=by(40, temperature=1.5, seed=seed))
        for seed, one in enumerate(requests)
    ]
    for request, result in zip(hot, run(engine, hot), strict=True):
        assert machine_accepts(request, result.tokens, ends)


def machine_accepts(request: Wanted, tokens: list[int], ends: Sequence[int]) -> bool:
    text = "".join(f"t{token}" for token in tokens if token not in ends)
    return re.fullmatch(request.pattern or "", text) is not None


def test_preempted_in_the_midst(engine: Engine):
    prompts, lengths = zip(*sample(4), strict=True)
    asked = [
        by(length, ignore_eos=True, temperature=0.8 * (number % 2), seed=number)
        for number, length in enumerate(lengths)
    ]
    wanted = [engine.run([p], a)[0] for p, a in zip(prompts, asked, strict=True)]
    ids = [engine.add(*one) for one in zip(prompts, asked, strict=True)]

    def meddle(step: int) -> None:
        running = [request.request_id for request in engine.scheduler.running]
        if running and step % 3 == 0 and step < 60:
            engine.preempt(running[step % len(running)])

    done = engine.drive(meddle)
    got = [finished(done[name].outputs[0]).tokens for name in ids]
    assert got == [one.tokens for one in wanted]


@pytest.mark.slow
def test_in_an_asynchronous_engine(engine: Engine, serve: Serve):
    """It sits steps out there, among requests that run ahead."""
    prompts, lengths = zip(*sample(), strict=True)
    asked = [
        by(length, ignore_eos=True, temperature=0.8 * (number % 2), seed=number)
        if number % 3
        else params(length, dlm={"strategy": "threshold"}, ignore_eos=True)
        for number, length in enumerate(lengths)
    ]
    wanted = engine.run(prompts, asked)
    ahead = serve(NEMOTRON, async_scheduling=True)
    with withholding(ahead) as steps:
        got = ahead.run(prompts, asked)
    assert [one.tokens for one in got] == [one.tokens for one in wanted]
    assert steps.ahead > 0


def test_published_pages_are_final(engine: Engine):
    """A draft's keys are never found: the next turn reads those of the text."""
    prompt = make_prompt(75, seed=7)
    engine.add(prompt, by(40, ignore_eos=True))
    text: list[int] = []
    while engine.busy:
        for output in engine.step():
            text = [*prompt, *output.outputs[0].token_ids]
        assert_only_final_pages_are_published(engine)
    output = engine.outputs([text], by(20, ignore_eos=True))[0]
    assert output.num_cached_tokens > 0
    engine.llm.reset_prefix_cache()
    (fresh,) = engine.run([text], by(20, ignore_eos=True))
    assert finished(output.outputs[0]).tokens == fresh.tokens


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dlm": {"step_map": True}}, "leave out step_map"),
        ({"dlm": {"eotp": "block"}}, "leave out eotp"),
        ({"dlm": {"reference_exact": True}}, "leave out reference_exact"),
        ({"dlm": {"sub_block_length": 4}}, "leave out sub_block_length"),
        ({"dlm": {"cache": "dual", "sub_block_length": 4}}, "cache, sub_block"),
    ],
)
def test_what_looks_at_steps_is_refused(engine: Engine, options, reason: str):
    with pytest.raises(VLLMValidationError, match=reason):
        engine.run([[1, 2]], by(4, **options))


@pytest.mark.parametrize("name", ["SDAR-4B-Chat", "Fast_dLLM_v2_7B"])
def test_other_families_are_refused(serve: Serve, name: str):
    with pytest.raises(VLLMValidationError, match="needs a causal model"):
        serve(name).run([[1, 2]], by(4))
