# SPDX-License-Identifier: Apache-2.0
"""Two workers write the oracle's tokens, whatever the family; experts shared out too.

LLaDA and SDAR have more in `test_tensor_parallel.py`. A layout of weights is tried once
where families share it with another of the same attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed.workers import start_engine
from engine import block_cases
from engine.block_cases import BlockCase
from engine.cases import Case, assert_equal, expect, make_prompt
from engine.families import FULL_ATTENTION, REUSES_BLOCKS, Served
from engine.harness import Engine
from engine.test_lora import LORA, Adapters, run
from reference.checkpoints import write_checkpoint
from reference.llada import write_random_checkpoint
from reference.network import TinyModel

pytestmark = pytest.mark.slow

OTHERS = {
    one.family: one for one in (*FULL_ATTENTION, *REUSES_BLOCKS) if one.family != "sdar"
}
HEADS = {
    # Qwen2's tiny ones have three, of width 32; two workers share one of keys.
    family: {"num_attention_heads": 4, "hidden_size": 128}
    for family in ("dream", "fast_dllm_v2", "a2d_qwen2")
}
EXPERTS = ("llada_moe", "llada2", "llada2_2", "sdar_moe", "rnd1")


@pytest.fixture(scope="module", autouse=True)
def scheduler_in_this_process(users_environment: None) -> Iterator[None]:
    """What the oracle asks of an engine; its workers are processes all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """`start(folder, dlm, **options)`: an engine of two workers, for one test."""
    running: list[Engine] = []

    def engine(folder: Path, dlm: dict[str, Any], **options: Any) -> Engine:
        two = {"tensor_parallel_size": 2, "disable_log_stats": True}
        running.append(start_engine(folder, dlm, **two, **options))
        return running[-1]

    yield engine
    for one in running:
        one.llm.llm_engine.engine_core.shutdown()


def cases_of(served: Served) -> list[Any]:
    lengths = (1, 7, 20, 37)
    if served in FULL_ATTENTION:
        return [
            Case(
                make_prompt(length, 5), "threshold", cache, served.block, max_tokens=40
            )
            for length in lengths
            for cache in ("none", "dual")
        ]
    return [
        BlockCase(make_prompt(length, 5), 40, rule)
        for length in lengths
        for rule in ("threshold", "static")
    ]


def wanted_of(served: Served, cases: list[Any], oracle: Any, engine: Engine) -> Any:
    if served in FULL_ATTENTION:
        return [expect(case, oracle, shift=served.shift) for case in cases]
    return [block_cases.expect(case, oracle, engine) for case in cases]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in OTHERS),
        *((family, {"enable_expert_parallel": True}) for family in EXPERTS),
    ],
    ids=[*OTHERS, *(f"{family}, experts shared out" for family in EXPERTS)],
)
def test_two_workers(
    start: Callable[..., Engine], tmp_path: Path, family: str, options: dict[str, Any]
):
    served = OTHERS[family]
    changes = served.changes | HEADS.get(family, {})
    folder = write_checkpoint(family, tmp_path / served.folder, seed=2, **changes)
    engine = start(folder, served.dlm, **options)
    cases = cases_of(served)
    wanted = wanted_of(served, cases, TinyModel.from_folder(folder), engine)
    got = engine.run([case.prompt for case in cases], [c.params() for c in cases])
    assert len({tuple(one.tokens) for one in got}) > len(cases) // 2
    assert_equal(cases, got, wanted)


def test_adapters(start: Callable[..., Engine], tmp_path: Path):
    """Each worker has its part of an adapter."""
    base = write_random_checkpoint(tmp_path / "base", seed=2)
    adapters = Adapters(base, tmp_path, 2)
    engine = start(base, {}, **LORA)
    numbers = [0, 1, 2, 1]
    cases = [
        Case(make_prompt(length, 5), "threshold", "none", 16, max_tokens=40)
        for length in (1, 7, 20, 33)
    ]
    wanted = [
        expect(case, adapters.oracle(number))
        for case, number in zip(cases, numbers, strict=True)
    ]
    got = run(engine, cases, [adapters.request(number) for number in numbers])
    assert_equal(cases, got, wanted)
