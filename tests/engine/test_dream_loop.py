# SPDX-License-Identifier: Apache-2.0
"""Dream with a cache as Fast-dLLM's code decodes it: `reference_exact`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.cases import make_prompt
from engine.fast_dllm_cases import (
    RULES,
    Loop,
    Wanted,
    assert_equal,
    rows_of,
    run,
    step_by_step,
)
from engine.harness import Engine, Finished
from reference.checkpoints import write_checkpoint
from reference.fast_dllm_procedures import generate_dream
from reference.network import TinyModel
from tiers import fast

EXACT = {"reference_exact": True}


@pytest.fixture(scope="module")
def dream_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dream") / "Dream-v0-Instruct-7B"
    return write_checkpoint("dream", folder, seed=5)


@pytest.fixture(scope="module")
def dream_engine(engines: Callable[..., Engine], dream_folder: Path) -> Engine:
    return engines(model=str(dream_folder))


@pytest.fixture(scope="module")
def dream_oracle(dream_folder: Path) -> TinyModel:
    return TinyModel.from_folder(dream_folder)


def dream_cases(count: int, seed: str) -> list[Loop]:
    source = random.Random(seed)
    cases = []
    rules = [name for name in RULES if name not in ("factor", "threshold/one")]
    for number in range(count):
        block = source.choice((1, 2, 3, 4, 8, 16, 20, 32))
        rule = rules[number % len(rules)]
        cases.append(
            Loop(
                make_prompt(source.randint(1, 60), seed=number),
                max_tokens=source.randint(1, 60),
                rule=rule,
                cache=("prefix", "dual")[number % 2],
                block=block,
                steps=source.choice((None, 1, 2, max(block // 2, 1), block))
                if rule.startswith(("dream", "static"))
                else None,
                mask=source.random() < 0.5 and rule.startswith("dream"),
                ignore_eos=number % 3 > 0,
            )
        )
    return cases


def exact_params(case: Loop) -> dict[str, Any]:
    return EXACT | {"block_length": case.block}


def dream_wanted(case: Loop, oracle: TinyModel) -> Wanted:
    def never_a_mask(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        logits = logits.clone()  # which says how sure the model is, masks included
        logits[:, oracle.mask_id] = -torch.inf
        return logits.argmax(dim=-1)

    blocks = -(-case.max_tokens // case.block)
    decode = partial(
        generate_dream,
        oracle,
        list(case.prompt),
        gen_length=blocks * case.block,
        block_length=case.block,
        cache=case.cache,
        steps=blocks * (case.steps or case.block),
        draw=None if case.mask else never_a_mask,
        eos_stop=not case.ignore_eos,
    )
    return Wanted.of(decode, case)


def run_exact(engine: Engine, cases: Sequence[Loop]) -> list[Finished]:
    mask_id = engine.scheduler.dlm_defaults.mask_token_id
    return engine.run(
        [case.prompt for case in cases],
        [case.params(mask_id, **exact_params(case)) for case in cases],
    )


@pytest.mark.parametrize(
    ("seed", "count"), fast(("first", 8), of=(("first", 8), ("second", 120)))
)
def test_dreams_loop(
    dream_engine: Engine, dream_oracle: TinyModel, seed: str, count: int
):
    """Every block length, steps and prompt; eight at a time, and alone."""
    cases = dream_cases(count, seed)
    wanted = [dream_wanted(case, dream_oracle) for case in cases]
    assert_equal(cases, run_exact(dream_engine, cases), wanted)
    alone = random.Random(seed).sample(range(len(cases)), count // 8)
    got = [run_exact(dream_engine, [cases[i]])[0] for i in alone]
    assert_equal([cases[i] for i in alone], got, [wanted[i] for i in alone])


@pytest.mark.parametrize(("cache", "later"), [("prefix", [16, 8]), ("dual", [8, 8])])
def test_rows_of_dreams_loop(dream_engine: Engine, cache: str, later: list[int]):
    """The row left of the block is not computed along; without the option it is."""
    case = Loop(make_prompt(21), 16, "static", cache)
    opening = [37]
    wanted = opening + 7 * later[:1] + opening + 7 * later[1:]
    options = {"block_length": 8}
    assert rows_of(dream_engine, case, **options, **EXACT) == wanted
    usual = [rows + (rows < 37) for rows in wanted]
    assert rows_of(dream_engine, case, **options) == usual


def test_only_the_reference_opens_a_block_alone(dream_engine: Engine):
    """Not without a cache, and not with dInfer's policy."""
    case = Loop(make_prompt(9), 16, "threshold", block=16)
    case = replace(case, rule="dream", steps=2)
    for cache in ("none", "vicinity"):
        (result,) = run(
            dream_engine, [replace(case, cache=cache)], block_length=16, **EXACT
        )
        assert result.forwards == 2
        assert dream_engine.scheduler.dlm_defaults.mask_token_id not in result.tokens
    (exact,) = run(dream_engine, [replace(case, steps=1)], block_length=16, **EXACT)
    assert exact.tokens[1:] == 15 * [dream_engine.scheduler.dlm_defaults.mask_token_id]
    (usual,) = run(dream_engine, [replace(case, steps=1)], block_length=16)
    assert dream_engine.scheduler.dlm_defaults.mask_token_id not in usual.tokens


def test_drawn_tokens_are_those_of_any_batch(dream_engine: Engine):
    """A temperature: the opening draws by position and step, as every step does."""
    mask_id = dream_engine.scheduler.dlm_defaults.mask_token_id
    cases = dream_cases(9, "drawn")
    sampling = [
        case.params(
            mask_id, drawn={"temperature": 0.8, "seed": number}, **exact_params(case)
        )
        for number, case in enumerate(cases)
    ]
    prompts = [case.prompt for case in cases]
    together = dream_engine.run(prompts, sampling)
    for number in (3, 8):
        (alone,) = dream_engine.run(prompts[number : number + 1], sampling[number])
        assert alone == together[number]


@pytest.mark.parametrize("cache", fast("dual", of=("prefix", "dual")))
def test_a_replay_of_dreams_loop(dream_engine: Engine, cache: str):
    mask_id = dream_engine.scheduler.dlm_defaults.mask_token_id
    case = Loop(make_prompt(11), 32, "dream", cache, block=16, mask=True)
    sampling = case.params(mask_id, **exact_params(case))
    tokens, rows, places = step_by_step(dream_engine, case.prompt, sampling)
    for stop in range(1, len(rows), 9):
        got, got_rows, _ = step_by_step(dream_engine, case.prompt, sampling, stop)
        begin = places.index((places[stop][0], 0))
        assert got == tokens
        assert got_rows == rows[:stop] + rows[begin:]
