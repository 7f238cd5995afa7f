# SPDX-License-Identifier: Apache-2.0
"""`reference_exact` with a temperature: confidence as the family's own code has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine.cases import make_prompt
from engine.harness import Engine, params
from reference.checkpoints import write_checkpoint

DYNAMIC = {"threshold": 0.9, "strict": True, "at_least": "scheduled"}


@pytest.fixture(scope="module")
def sdar(engines: Callable[..., Engine], tmp_path_factory: Any) -> Engine:
    folder: Path = tmp_path_factory.mktemp("model") / "SDAR-4B-Chat-b8"
    return engines(model=str(write_checkpoint("sdar", folder, seed=2)))


@pytest.fixture(scope="module")
def fast(engines: Callable[..., Engine], tmp_path_factory: Any) -> Engine:
    folder: Path = tmp_path_factory.mktemp("model") / "Fast_dLLM_v2_7B"
    return engines(model=str(write_checkpoint("fast_dllm_v2", folder, seed=2)))


def ask(engine: Engine, exact: bool, prompt_len: int = 8, **options: Any):
    dlm = {
        "strategy": "threshold",
        "strategy_config": DYNAMIC,
        "reference_exact": exact,
    }
    (result,) = engine.run(
        [make_prompt(prompt_len)],
        params(16, dlm=dlm, ignore_eos=True, **options),
    )
    return result


def test_the_only_token_left_is_certain_to_the_reference(sdar: Engine):
    """SDAR's greedy way, top_k 1, makes every confidence 1: a block takes one step."""
    drawn = {"temperature": 1.0, "top_k": 1, "seed": 3}
    assert ask(sdar, exact=True, **drawn).forwards == 2
    assert ask(sdar, exact=False, **drawn).forwards > 2


def test_cooler_text_is_surer_to_the_reference(sdar: Engine):
    cool = {"temperature": 0.05, "seed": 3}
    assert ask(sdar, exact=True, **cool).forwards <= ask(sdar, exact=False).forwards


def test_the_first_token_of_a_block_is_never_drawn_by_the_reference(fast: Engine):
    """Fast-dLLM v2 takes it from the finished blocks, greedily at any temperature."""
    greedy = ask(fast, exact=True, prompt_len=32)
    hot = {"temperature": 2.0, "prompt_len": 32}
    firsts = [ask(fast, exact=True, seed=s, **hot).tokens[0] for s in range(6)]
    assert set(firsts) == {greedy.tokens[0]}
    drawn = [ask(fast, exact=False, seed=s, **hot).tokens[0] for s in range(6)]
    assert len(set(drawn)) > 1


def test_neighbours_do_not_matter(sdar: Engine):
    """Exact and sane requests, drawn and greedy, side by side and alone."""
    sampling = [
        params(
            20,
            dlm={
                "strategy": ["threshold", "static"][number % 2],
                "strategy_config": [DYNAMIC, {"mode": "entropy"}][number % 2],
                "reference_exact": number % 3 == 0,
            },
            temperature=[0.0, 0.7, 1.0][number % 3],
            top_k=[0, 4][number % 2],
            top_p=[1.0, 0.8][number // 2 % 2],
            seed=number,
        )
        for number in range(12)
    ]
    prompts = [make_prompt(1 + 3 * number, number) for number in range(12)]
    together = sdar.run(prompts, sampling)
    alone = [sdar.run([p], [s])[0] for p, s in zip(prompts, sampling, strict=True)]
    assert together == alone
