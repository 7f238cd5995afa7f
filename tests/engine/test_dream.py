# SPDX-License-Identifier: Apache-2.0
"""Dream as its own code decodes it: schedule, algs, and the whole canvas as a block."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.cases import is_near_tie, make_prompt
from engine.harness import Engine, Finished, params
from reference.checkpoints import write_checkpoint
from reference.network import TinyModel
from reference.procedures import generate
from reference.rules import DREAM_ALGS, Rule, View, dream
from tiers import fast

from vllm_dlm.kernels.draw import uniform


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dream") / "Dream-v0-Instruct-7B"
    return write_checkpoint("dream", folder, seed=5)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> TinyModel:
    return TinyModel.from_folder(folder)


@pytest.fixture(scope="module")
def dream_engine(engines: Callable[..., Engine], folder: Path) -> Engine:
    return engines(model=str(folder))


def request(
    max_tokens: int, steps: int | None, seed: int, block: int | str, **config: Any
):
    dlm = {
        "strategy": "dream",
        "strategy_config": config,
        "block_length": block,
        "steps": steps,
    }
    return params(max_tokens, dlm=dlm, seed=seed)


def rule(prompt: tuple[int, ...], seed: int, **config: Any) -> Rule:
    def engine_noise(view: View) -> torch.Tensor:
        places = len(prompt) + view.first + torch.arange(len(view.masked))
        return uniform(torch.tensor(seed), places, torch.tensor(view.step))

    return dream(**config, uniform=engine_noise)


def agrees(
    got: Finished,
    oracle: TinyModel,
    prompt: tuple[int, ...],
    *,
    max_tokens: int,
    steps: int | None,
    seed: int,
    block: int | str,
    **config: Any,
) -> bool:
    """Whether tokens and forwards equal the oracle's; True for near-ties too."""
    length = max_tokens if block == "canvas" else int(block)
    width = -(-max_tokens // length) * length
    the_rule = rule(prompt, seed, **config)
    ties: list[bool] = []
    wanted = generate(
        oracle,
        list(prompt),
        gen_length=width,
        block_length=length,
        rule=the_rule,
        steps=steps,
        shift=1,
        observe=lambda view, chosen: ties.append(is_near_tie(the_rule, view, chosen)),
    )
    tokens = wanted.tokens[:max_tokens]
    forwards = max(wanted.step_of_position[: len(tokens)]) + 1
    return (got.tokens, got.forwards) == (tokens, forwards) or any(ties)


ALGS = [*itertools.product((16, "canvas"), DREAM_ALGS)]


@pytest.mark.parametrize(
    ("block", "alg"),
    # Blocks of 16 are drawn in the same way, and sooner.
    fast((16, "topk_margin"), (16, "entropy"), ("canvas", "maskgit_plus"), of=ALGS),
)
def test_algs(dream_engine: Engine, oracle: TinyModel, alg: str, block: int | str):
    requests = [
        {
            "max_tokens": 17 + 5 * number,
            "steps": [None, 16, 24][number % 3],
            "seed": number,
            "block": block,
            "alg": alg,
            "alg_temp": 0.0 if alg == "origin" else [0.0, 0.3][number % 2],
        }
        for number in range(6)
    ]
    prompts = [make_prompt(3 + 7 * number, number) for number in range(6)]
    results = dream_engine.run(prompts, [request(**options) for options in requests])
    for prompt, options, result in zip(prompts, requests, results, strict=True):
        assert agrees(result, oracle, prompt, **options), options


def test_diffucoder_measures_what_it_draws_from(dream_engine: Engine):
    """As `reference_exact` does with this family, but for the mask token."""

    def run(strategy: str, **options: Any) -> list[list[int]]:
        dlm = {"strategy": strategy, "block_length": 16, "steps": 16} | options
        never_a_mask = {dream_engine.scheduler.dlm_defaults.mask_token_id: -100.0}
        prompts = [make_prompt(3 + number, number) for number in range(12)]
        results = dream_engine.run(
            prompts,
            params(
                32,
                dlm=dlm,
                temperature=temperature,
                top_p=0.95,
                seed=7,
                logit_bias=never_a_mask,
                ignore_eos=True,
            ),
        )
        return [result.tokens for result in results]

    temperature = 0.8
    drawn = run("diffucoder")
    assert drawn == run("dream", reference_exact=True)
    assert drawn != run("dream")
    temperature = 0.0
    assert run("diffucoder") == run("dream")


def test_the_first_of_as_many_steps_as_tokens_writes_nothing(dream_engine: Engine):
    """Upstream's counts are 0, 1, ..., 1, 2: the schedule's rounding, kept as it is."""
    (result,) = dream_engine.run(
        [make_prompt(9)],
        params(
            32,
            dlm={"strategy": "dream", "block_length": "canvas"},
            ignore_eos=True,
        ),
    )
    assert result.forwards == 32
    histogram = result.output.spec_decode_metrics.histogram
    assert sum(histogram) == 32


def test_a_whole_canvas_is_as_wide_as_the_output(dream_engine: Engine):
    """Not rounded up to some block: positions that nobody asked for would be seen."""
    sampling = params(
        37,
        dlm={"block_length": "canvas", "strategy": "static", "steps": 1},
        ignore_eos=True,
    )
    request_id = dream_engine.add(make_prompt(10), sampling)
    dream_engine.step()
    while dream_engine.busy:
        dream_engine.step()
    dream_engine.flush()
    assert request_id not in dream_engine.scheduler.requests
    (result,) = dream_engine.run([make_prompt(10)], sampling)
    assert (len(result.tokens), result.forwards) == (37, 1)
