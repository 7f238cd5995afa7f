# SPDX-License-Identifier: Apache-2.0
"""Blocks whose positions are deleted and inserted, in a model with two such tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from engine.cases import TIE, make_prompt
from engine.harness import Engine, params
from reference.checkpoints import write_checkpoint
from reference.levenshtein import generate_levenshtein
from reference.network import TinyModel
from vllm import SamplingParams

BLOCK = 8
MAX_MODEL_LEN = 256
# Both among the tokens that the random weights predict most.
EDITS = {"delete_token_id": 114, "split_token_id": 70}
RULES: tuple[dict[str, Any], ...] = (
    {"max_post_steps": 12},
    {"mask_threshold": 0.3, "edit_threshold": 0.3, "max_post_steps": 3},
    {"mask_threshold": 0.8, "edit_threshold": 0.6},
)


@dataclass(frozen=True)
class Case:
    """One request."""

    prompt: tuple[int, ...]
    max_tokens: int
    rule: dict[str, Any]
    stops: bool

    def params(self, **more: Any) -> SamplingParams:
        dlm = {"strategy": "levenshtein", "strategy_config": self.rule}
        return params(self.max_tokens, dlm=dlm, ignore_eos=not self.stops, **more)


CASES = [
    Case(
        make_prompt(length, seed=length),
        max_tokens=3 + 5 * length % 14,
        rule=RULES[length % 3],
        stops=length % 4 > 0,
    )
    for length in range(1, 2 * BLOCK + 1)
]
"""Every length of a prompt's tail; texts that end inside a block and at its end."""


@pytest.fixture(scope="module")
def served(
    engines: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, TinyModel]:
    folder = tmp_path_factory.mktemp("model") / "LLaDA2.2-mini"
    write_checkpoint("llada2_2", folder, seed=2, **EDITS)
    return engines(model=str(folder)), TinyModel.from_folder(folder)


def test_parity(served: tuple[Engine, TinyModel]):
    """Tokens and forwards, in one batch and alone; whatever can happen does."""
    engine, oracle = served
    got = engine.run([case.prompt for case in CASES], [case.params() for case in CASES])
    events: set[str] = set()
    compared = 0
    for case, result in zip(CASES, got, strict=True):
        gaps: list[float] = []
        wanted, forwards = generate_levenshtein(
            oracle,
            list(case.prompt),
            max_tokens=case.max_tokens,
            block_length=BLOCK,
            stops=case.stops,
            events=events,
            observe=gaps.append,
            **case.rule,
        )
        assert not {oracle.mask_id, *EDITS.values()} & set(result.tokens)
        if min(gaps) < TIE:
            continue
        compared += 1
        assert (result.tokens, result.forwards) == (wanted, forwards), case
    assert compared > 0.7 * len(CASES)
    assert events == {
        "deleted",
        "inserted",
        "repeated",
        "text instead of an edit",
        "cut short",
    }
    alone = [engine.run([case.prompt], [case.params()])[0] for case in CASES[::15]]
    assert alone == got[::15]


def test_a_block_at_the_contexts_end(served: tuple[Engine, TinyModel]):
    """The last block is short: what moves behind its end is gone."""
    engine, oracle = served
    prompt = make_prompt(engine.scheduler.max_model_len - 13, seed=3)
    case = Case(prompt, 13, RULES[0], stops=False)
    wanted, _ = generate_levenshtein(
        oracle,
        list(prompt),
        max_tokens=13,
        block_length=BLOCK,
        max_model_len=engine.scheduler.max_model_len,
        stops=False,
        **case.rule,
    )
    assert engine.run([prompt], [case.params()])[0].tokens == wanted


def test_it_is_the_models_default(served: tuple[Engine, TinyModel]):
    engine, _ = served
    prompts = [make_prompt(length) for length in (3, 17)]
    plain = params(12, ignore_eos=True)
    named = params(12, ignore_eos=True, dlm={"strategy": "levenshtein"})
    assert engine.run(prompts, plain) == engine.run(prompts, named)


@pytest.mark.slow
def test_drawn_restricted_and_observed(served: tuple[Engine, TinyModel]):
    """What else requests ask for: the text is the same in a batch and alone."""
    engine, _ = served
    options: list[dict[str, Any]] = [
        {"temperature": 0.8, "seed": 4},
        {"allowed_token_ids": [5, 6, 7, *EDITS.values()]},
        {"logit_bias": {30: 4.0}, "min_tokens": 9},
        {"logprobs": 2},
        {"bad_words": ["t7"]},
    ]
    prompts = [make_prompt(4 + number) for number in range(len(options))]
    case = Case((), 14, RULES[0], stops=True)
    sampling = [case.params(**one) for one in options]
    together = engine.run(prompts, sampling)
    assert set(together[1].tokens) <= {5, 6, 7}
    assert not any({*EDITS.values()} & set(one.tokens) for one in together)
    alone = [
        engine.run([prompt], [one])[0]
        for prompt, one in zip(prompts, sampling, strict=True)
    ]
    assert alone == together


@pytest.mark.slow
def test_lost_pages(engines: Callable[..., Engine], tmp_path_factory: Any):
    """A request that loses its pages replays its block, edits and all."""
    folder = tmp_path_factory.mktemp("model") / "LLaDA2.2-mini"
    write_checkpoint("llada2_2", folder, seed=2, **EDITS)
    engine = engines(
        model=str(folder), max_num_batched_tokens=64, num_gpu_blocks_override=13
    )
    cases = [
        Case(make_prompt(length), 60, RULES[length % 3], stops=False)
        for length in (9, 64, 71, 95, 96, 100, 130, 150)
    ]
    alone = [engine.run([case.prompt], [case.params()])[0] for case in cases]
    outputs, _ = engine.run_short_of_pages(
        [case.prompt for case in cases], [case.params() for case in cases]
    )
    got = [list(output.outputs[0].token_ids) for output in outputs]
    assert got == [one.tokens for one in alone]
