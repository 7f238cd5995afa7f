# SPDX-License-Identifier: Apache-2.0
"""Logits that are no numbers end their request in an error, and harm no other one.

The checkpoints have damaged embeddings: whatever holds the token `BAD` has NaN logits,
and `HUGE` makes infinite ones. The same prompts without these tokens are healthy.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.cases import make_prompt
from engine.harness import Engine, params
from reference.checkpoints import write_checkpoint
from reference.registered import PLAIN
from safetensors.torch import load_file, save_file
from tiers import fast

from vllm_dlm.admission.broken_logits import REASON, Reports
from vllm_dlm.learn2pd.recorder import IGNORED

BAD, HUGE = 115, 116
"""No prompt of `make_prompt` has them, and the models do not write them by themselves:
their own logits are 0."""
NEVER = 117
"""Its own logit is NaN, and no other is: it is not written, and nothing breaks."""

EMBEDDINGS = ("wte.weight", "embed_tokens.weight")
HEADS = ("transformer.ff_out.weight", "lm_head.weight", "diffusion_head.weight")
"""How the families' checkpoints call them, in part."""

HEALTHY = [make_prompt(length) for length in (3, 30, 41, 64)]


def damage(folder: Path) -> Path:
    """Damage the embeddings of `BAD` and `HUGE` in a checkpoint."""
    weights = load_file(folder / "model.safetensors")
    (name,) = (name for name in weights if name.endswith(EMBEDDINGS))
    weights[name][BAD] = torch.nan
    weights[name][HUGE] = torch.inf
    (head,) = (name for name in weights if name.endswith(HEADS))
    weights[head][[BAD, HUGE]] = 0
    weights[head][NEVER] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def damaged(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaDA's tests' checkpoint, damaged; with its filters and frequencies."""
    folder = tmp_path_factory.mktemp("damaged") / "llada"
    shutil.copytree(checkpoint, folder)
    return damage(folder)


@pytest.fixture(scope="module")
def damaged_engine(engines: Callable[..., Engine], damaged: Path) -> Engine:
    return engines(model=str(damaged), dlm={"record_traces": True})


def assert_broken(output: Any) -> None:
    assert (output.finish_reason, output.stop_reason) == ("error", REASON)
    assert list(output.token_ids) == []


def assert_only_the_damaged_fail(engine: Engine, sampling: Any) -> None:
    """Between, beside and after damaged requests, healthy ones are as if alone."""
    alone = engine.run(HEALTHY, sampling)
    assert {one.output.finish_reason for one in alone} <= {"stop", "length"}
    broken = [[*prompt, bad] for prompt in HEALTHY for bad in (BAD, HUGE)]
    mixed = engine.outputs(
        [
            prompt
            for three in zip(broken[::2], HEALTHY, broken[1::2], strict=True)
            for prompt in three
        ],
        sampling,
    )
    outputs = [result.outputs[0] for result in mixed]
    for output in outputs[::3] + outputs[2::3]:
        assert_broken(output)
    together = [list(output.token_ids) for output in outputs[1::3]]
    assert together == [one.tokens for one in alone]
    # On the pages that the damaged ones have left full of NaNs.
    after = engine.run(HEALTHY, sampling)
    assert [one.tokens for one in after] == [one.tokens for one in alone]


PARAMETERS: dict[str, dict[str, Any]] = {"replay": {"recorded_steps": [0, 1, 2, 3] * 8}}


@pytest.mark.slow
def test_whatever_the_strategy(damaged_engine: Engine):
    """All of them in one batch, each with a healthy request and a damaged one."""
    sampling = [
        params(
            24,
            dlm={
                "strategy": strategy,
                "strategy_config": PARAMETERS.get(strategy, {}),
                "block_length": 16,
            },
            ignore_eos=True,
            logprobs=2,
        )
        for strategy in PLAIN
    ]
    prompts = [make_prompt(3 + 2 * number) for number in range(len(sampling))]
    alone = damaged_engine.run(prompts, sampling)
    assert {one.output.finish_reason for one in alone} == {"length"}
    mixed = damaged_engine.outputs(
        [[*prompt, *more] for prompt in prompts for more in ((), (BAD,))],
        [one for one in sampling for _ in range(2)],
    )
    outputs = [result.outputs[0] for result in mixed]
    for output in outputs[1::2]:
        assert_broken(output)
    together = [list(output.token_ids) for output in outputs[::2]]
    assert together == [one.tokens for one in alone]


@pytest.mark.parametrize(
    "options",
    fast(
        {"temperature": 0.8, "seed": 1, "top_k": 5, "top_p": 0.9},
        {"min_tokens": 4, "allowed_token_ids": [3, 5, 8, 121]},
        of=[
            {"temperature": 0.8, "seed": 1, "top_k": 5, "top_p": 0.9},
            {"min_tokens": 4, "allowed_token_ids": [3, 5, 8, 121]},
            {"bad_words": ["t3", "t5 t8"], "logit_bias": {7: 3.0}},
            {"dlm": {"step_map": True, "cache": "dual"}},
        ],
    ),
    ids=str,
)
def test_whatever_the_request_asks(damaged_engine: Engine, options: dict[str, Any]):
    assert_only_the_damaged_fail(damaged_engine, params(24, **options))


FAMILIES = {
    "SDAR-4B-Chat-b16": ("sdar", {"max_position_embeddings": 8192}),
    "Fast_dLLM_v2_7B": ("fast_dllm_v2", {"bd_size": 16}),
    "Nemotron-Labs-Diffusion-8B": ("nemotron", {"block_size": 16}),
    "Dream-v0-Instruct-7B": ("dream", {}),
}


# One whose blocks begin with a seed; the tests above have one with full attention.
@pytest.mark.parametrize("name", fast("Fast_dLLM_v2_7B", of=FAMILIES))
def test_whatever_the_class(engines: Callable[..., Engine], tmp_path: Path, name: str):
    """Seeds are the first that a damaged prompt's rows predict."""
    family, changes = FAMILIES[name]
    folder = damage(write_checkpoint(family, tmp_path / name, seed=2, **changes))
    engine = engines(model=str(folder), dlm={"block_length": 16})
    assert_only_the_damaged_fail(engine, params(40, ignore_eos=True))


def test_a_draft_that_breaks_is_passed_over(damaged_engine: Engine):
    """A sequence that would write it writes it, and breaks in its next step."""
    dlm = {"strategy": "freedave", "block_length": 8}
    wants = {"logit_bias": {BAD: 60.0}, "ignore_eos": True}
    results = damaged_engine.outputs(HEALTHY, params(16, dlm=dlm, **wants))
    for result in results:
        assert_broken(result.outputs[0])


def test_nothing_that_is_allowed_has_a_chance(damaged_engine: Engine):
    sampling = params(8, allowed_token_ids=[NEVER])
    (result,) = damaged_engine.outputs(HEALTHY[:1], sampling)
    assert_broken(result.outputs[0])


def test_what_was_written_before_is_not_taught(damaged_engine: Engine):
    """A filter learns nothing of the steps of a broken block."""
    recorder = damaged_engine.runner.sampler.observers["learn2pd"].recorder
    dlm = {"strategy": "threshold"}
    damaged_engine.flush()
    before = len(recorder.traces(32, "none"))
    damaged_engine.outputs([[*HEALTHY[0], BAD]], params(32, dlm=dlm))
    damaged_engine.flush()
    traces = recorder.traces(32, "none")
    assert len(traces) == before + 1
    assert (traces.label[-1] == IGNORED).all()


def test_every_choice_and_every_pages_return(damaged_engine: Engine):
    engine = damaged_engine
    engine.flush()
    free = engine.free_pages
    sampling = params(32, n=3, temperature=0.9, seed=3)
    (result,) = engine.outputs([[*HEALTHY[1], BAD]], sampling)
    assert len(result.outputs) == 3
    for output in result.outputs:
        assert_broken(output)
    engine.flush()
    assert engine.free_pages == free


def test_reports_are_rare(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    reports = Reports("my-model")
    assert reports.add(0) is None
    first = reports.add(1)
    assert first is not None and "my-model: 1 request ended" in first
    assert reports.add(2) is None
    now[0] = 61.0
    second = reports.add(0)
    assert second is not None and "my-model: 2 requests ended" in second
    assert reports.add(0) is None
