# SPDX-License-Identifier: Apache-2.0
"""Holes that widen and narrow while they are written: the engine against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.cases import MASK_ID, make_prompt
from engine.elastic_cases import (
    EOS,
    EVENTFUL_SHIFTED,
    EXPAND,
    Infill,
    assert_eventful,
    make_cases,
)
from engine.harness import Engine, drive, finished, params
from engine.test_counts import counting
from engine.test_no_waits import Waits
from reference.checkpoints import write_checkpoint
from reference.llada import TinyLLaDA
from reference.network import TinyModel
from tiers import fast
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from vllm_dlm.entrypoints.canvas_fields import canvas_fields
from vllm_dlm.kernels.draw import draw, tempered


@pytest.fixture(scope="module")
def elastic(engines: Callable[..., Engine]) -> Engine:
    return engines(hf_overrides={"expand_token_id": EXPAND})


ORDINARY = [
    params(24, dlm={"strategy": "static", "steps": 8, "block_length": 8}),
    params(16, dlm={"suffix": [5, 6, 7], "block_length": 16}),
    params(40, dlm={"strategy": "threshold", "block_length": 32}),
]
PLAIN = [make_prompt(9, 7 + number) for number in range(len(ORDINARY))]


def test_parity(elastic: Engine, oracle: TinyLLaDA):
    """Together with ordinary requests, which are decoded as alone."""
    cases = make_cases()
    wanted = [case.expected(oracle) for case in cases]
    assert_eventful(wanted)
    alone = [elastic.run([p], o)[0] for p, o in zip(PLAIN, ORDINARY, strict=True)]
    got = elastic.run(
        [*PLAIN, *(case.prompt for case in cases)],
        [*ORDINARY, *(case.params() for case in cases)],
    )
    assert got[: len(PLAIN)] == alone
    got = got[len(PLAIN) :]
    for case, want, one in zip(cases, wanted, got, strict=True):
        assert (one.tokens, one.forwards) == (want.tokens, want.forwards), case
        is_over = one.tokens[-1] == EOS
        assert one.output.finish_reason == ("stop" if is_over else "length"), case
    solo = [elastic.run([case.prompt], case.params())[0] for case in cases[::5]]
    assert solo == got[::5]


@pytest.mark.parametrize(
    ("strategy", "own"),
    fast(
        ("static", {"mode": "random"}),
        ("threshold", {"at_least": "scheduled"}),
        of=[
            ("static", {"mode": "random"}),
            ("static", {"mode": "left_to_right"}),
            ("static", {"mode": "margin"}),
            ("threshold", {"at_least": "scheduled"}),
            ("factor", {"factor": 4.0}),
            ("eb", {"bound": 2.0}),
            ("entropy", {"threshold": 1.0}),
        ],
    ),
)
def test_strategies_without_an_oracle_here(elastic: Engine, strategy: str, own: dict):
    """Texts alone in their holes, the same alone as together."""
    cases = make_cases()[:3]
    asked = [case.params(temperature=0.6, seed=1) for case in cases]
    for one in asked:
        one.extra_args["dlm"] |= {"strategy": strategy, "strategy_config": own}
    together = elastic.run([case.prompt for case in cases], asked)
    for case, one in zip(cases, together, strict=True):
        assert EXPAND not in one.tokens and EOS not in one.tokens[:-1]
        assert len(one.tokens) <= case.most
    assert elastic.run([cases[0].prompt], asked[0]) == together[:1]


def test_a_forward_computes_what_there_is(elastic: Engine, oracle: TinyLLaDA):
    """Prompt, hole and suffix, as long as they are; a row of logits for each mask."""
    case = make_cases()[1]
    wanted = case.expected(oracle)
    with counting(elastic) as counts:
        (got,) = elastic.run([case.prompt], case.params())
    assert got.tokens == wanted.tokens
    around = len(case.prompt) + len(case.suffix) + 2 * (case.source != "suffix")
    assert counts.rows == [around + length for length in wanted.lengths]
    assert len(set(wanted.lengths)) > 3


def test_drawn_tokens(elastic: Engine, oracle: TinyLLaDA):
    """Confidence is that of the distribution that is drawn from, as published."""
    heat, top_p = torch.tensor([0.7]), torch.tensor([0.9])
    off, zero = torch.tensor([0]), torch.tensor([0.0])
    for seed, case in enumerate(make_cases()[::5]):

        def shaped(logits: torch.Tensor) -> torch.Tensor:
            rows = len(logits)
            shaping = (heat, off, top_p, zero)
            return tempered(logits, *(one.expand(rows) for one in shaping))

        def drawing(
            logits: torch.Tensor, places: list[int], step: int, seed: int = seed
        ) -> torch.Tensor:
            rows = len(logits)
            return draw(
                logits,
                logits.argmax(dim=-1),
                *(one.expand(rows) for one in (heat, off, top_p, zero)),
                seed=torch.full((rows,), seed),
                position=torch.tensor(places),
                step=torch.full((rows,), step),
            )

        wanted = replace(case, threshold=None).expected(
            oracle, draw=drawing, shaped=shaped
        )
        more = {"temperature": 0.7, "top_p": 0.9, "seed": seed}
        (got,) = elastic.run(
            [case.prompt], replace(case, threshold=None).params(**more)
        )
        assert (got.tokens, got.forwards) == (wanted.tokens, wanted.forwards), case


def test_a_hole_may_close(elastic: Engine):
    """With nothing in it: an answer without a text, or what is around it."""
    case = Infill(make_prompt(8), (7, 8), most=9, end=100.0)
    with_text = replace(case, source="canvas")
    no_suffix = replace(with_text, suffix=())
    cases = [case, with_text, no_suffix]
    got = elastic.run([case.prompt] * 3, [one.params() for one in cases])
    assert [one.tokens for one in got] == [
        [EOS],
        [3, 4, 7, 8, EOS],
        [3, 4, EOS],
    ]
    assert [one.forwards for one in got] == [4, 4, 4]
    assert {one.output.finish_reason for one in got} == {"stop"}
    texts = [one.output.text.strip() for one in got]
    assert texts == ["", "t3 t4 t7 t8", "t3 t4"]


def test_after_preemptions(elastic: Engine):
    """The request begins anew, and writes the same."""
    cases = make_cases()[:8]
    asked = [case.params() for case in cases]
    for number, one in enumerate(asked[::3]):
        one.temperature, one.seed = 0.8, number
    prompts = [case.prompt for case in cases]
    together = elastic.run(prompts, asked)
    names = [elastic.add(*one) for one in zip(prompts, asked, strict=True)]
    hit = 0

    def preempt(step: int) -> None:
        nonlocal hit
        running = [r for r in elastic.scheduler.running if r.num_preemptions < 2]
        if running and step < 30:
            elastic.preempt(running[step % len(running)].request_id)
            hit += 1

    done = drive(elastic, preempt)
    assert [done[name].tokens for name in names] == [one.tokens for one in together]
    assert hit >= 8


def test_steps_do_not_wait_for_the_device(elastic: Engine):
    for case, more in zip(make_cases()[1:3], ({}, {"temperature": 0.8}), strict=True):
        elastic.add(case.prompt, case.params(**more))
    elastic.step()  # what is made of a request once
    with Waits() as waits:
        for _ in range(6):
            elastic.step()
    while elastic.busy:
        elastic.step()
    assert not waits.seen


@pytest.mark.slow  # an engine of its own
def test_short_of_pages(engines: Callable[..., Engine], oracle: TinyLLaDA):
    """Holes that widen ask for pages: some requests lose theirs, and begin anew."""
    engine = engines(
        hf_overrides={"expand_token_id": EXPAND},
        max_model_len=128,
        num_gpu_blocks_override=8,
    )
    cases = [
        Infill(make_prompt(28, number), (number,), most=40, initial=6, widen=20.0)
        for number in range(4)
    ]
    wanted = [case.expected(oracle).tokens for case in cases]
    outputs, _ = engine.run_short_of_pages(
        [case.prompt for case in cases], [case.params() for case in cases]
    )
    assert [list(one.outputs[0].token_ids) for one in outputs] == wanted
    engine.flush()
    assert engine.free_pages == 7


def test_streams_and_several_outputs(elastic: Engine):
    case = make_cases()[0]
    whole = elastic.run([case.prompt], case.params())[0].tokens
    sampling = case.params()
    sampling.output_kind = RequestOutputKind.DELTA
    elastic.add(case.prompt, sampling)
    tokens: list[int] = []
    while elastic.busy:
        for output in elastic.step():
            tokens += output.outputs[0].token_ids
    assert tokens == whole
    (result,) = elastic.outputs(
        [case.prompt], case.params(n=3, temperature=1.0, seed=1)
    )
    texts = {tuple(finished(output).tokens) for output in result.outputs}
    assert len(texts) > 1


def test_names_of_an_elastic_hole(elastic: Engine):
    """Offsets from the right: what is behind the hole has moved."""
    tokenizer = elastic.llm.get_tokenizer()
    dlm = {"canvas_text": "t1 {{name:9}}t2 t3", "holes": "elastic", "initial_hole": 1}
    for bias in ({EOS: 100.0}, {EXPAND: 4.0}):
        asked = params(None, dlm=dlm, logit_bias=bias)
        (result,) = elastic.outputs([make_prompt(5)], asked)
        tokens = list(result.outputs[0].token_ids)
        if result.outputs[0].finish_reason == "stop":
            assert tokens.pop() == EOS
        assert tokens[0] == 1 and tokens[-2:] == [2, 3]
        fields = canvas_fields(result, asked, tokenizer)
        assert fields == {"name": tokenizer.decode(tokens[1:-2])}
        assert result.outputs[0].text.strip() == tokenizer.decode(tokens)


def test_an_end_that_the_request_writes_is_the_texts(elastic: Engine):
    """No second one comes behind it, and a hole that is full ends there too."""
    for bias in ({EOS: 100.0}, {EXPAND: 100.0}):
        dlm = {"canvas": [3, MASK_ID, MASK_ID, EOS], "holes": "elastic"}
        asked = params(4, dlm=dlm, logit_bias=bias)
        (one,) = elastic.run([make_prompt(5)], asked)
        assert one.tokens.count(EOS) == 1 and one.tokens[-1] == EOS
        assert one.output.finish_reason == "stop"


def test_with_dreams_shift(engines: Callable[..., Engine], tmp_path: Path):
    folder = write_checkpoint("dream", tmp_path / "DreamOn-v0-7B", seed=5)
    oracle = TinyModel.from_folder(folder)
    engine = engines(model=str(folder), hf_overrides={"expand_token_id": EXPAND})
    cases = make_cases(EVENTFUL_SHIFTED)
    wanted = [case.expected(oracle, shift=1) for case in cases]
    assert_eventful(wanted)
    got = engine.run([c.prompt for c in cases], [case.params() for case in cases])
    for case, want, one in zip(cases, wanted, got, strict=True):
        assert (one.tokens, one.forwards) == (want.tokens, want.forwards), case


SUFFIX = {"suffix": [5, 6], "holes": "elastic"}


@pytest.mark.parametrize(
    ("dlm", "more", "told"),
    [
        ({"block_length": 8}, {}, ["dlm.block_length", "one block"]),
        ({"steps": 4}, {}, ["dlm.steps", "no number of steps"]),
        ({"cache": "dual"}, {}, ["dlm.cache", "'none'"]),
        ({"eotp": "block"}, {}, ["dlm.eotp", "'off'"]),
        ({"strategy": "klass"}, {}, ["dlm.strategy 'klass'", "static", "entropy"]),
        ({"strategy": "joint"}, {}, ["dlm.strategy 'joint'"]),
        ({"growth": "daedal"}, {}, ["growth"]),
        ({"reference_exact": True}, {}, ["reference_exact"]),
        ({"step_map": True}, {}, ["dlm.step_map"]),
        ({"pinned": False}, {}, ["dlm.pinned"]),
        ({"initial_hole": 0}, {}, ["dlm.initial_hole"]),
        ({"holes": None, "initial_hole": 3}, {}, ["dlm.initial_hole", "elastic"]),
        (
            {"suffix": None, "canvas": [MASK_ID, 1, MASK_ID]},
            {"max_tokens": 3},
            ["dlm.holes", "one hole", "has 2"],
        ),
        ({}, {"min_tokens": 2}, ["min_tokens", "no token at all"]),
        ({}, {"stop": ["a"]}, ["stop"]),
        ({}, {"logprobs": 0}, ["logprobs"]),
        ({}, {"bad_words": ["t3"]}, ["bad_words", "neighbours"]),
        ({}, {"allowed_token_ids": [EXPAND]}, ["allowed_token_ids", "no text"]),
        (
            {},
            {"structured_outputs": StructuredOutputsParams(regex="a*")},
            ["holes 'elastic'"],
        ),
        ({}, {"max_tokens": 251}, ["253 positions", "256"]),
    ],
    ids=str,
)
def test_refused(elastic: Engine, dlm: dict[str, Any], more: dict, told: list[str]):
    asked = params(**{"max_tokens": 9, **more}, dlm=SUFFIX | dlm)
    with pytest.raises(VLLMValidationError) as caught:
        elastic.run([make_prompt(5)], asked)
    for text in told:
        assert text in str(caught.value)


def test_models_that_do_not_ask_for_places_refuse_it(engine: Engine):
    with pytest.raises(VLLMValidationError, match="no expand_token_id"):
        engine.run([make_prompt(5)], params(9, dlm=SUFFIX))
