# SPDX-License-Identifier: Apache-2.0
"""Blocks that change what they wrote, in a model that keeps finished blocks' KV."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
from engine.block_cases import RULES, BlockCase, expect, run
from engine.cases import TIE, assert_equal, make_prompt
from engine.harness import Engine
from reference.checkpoints import write_checkpoint
from reference.llada21 import NeverEnds, generate_llada21
from reference.network import TinyModel
from tiers import fast
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

BLOCK = 16


@pytest.fixture(scope="module")
def served(
    engines: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, TinyModel]:
    """A checkpoint that is LLaDA2.1 by its name."""
    folder = tmp_path_factory.mktemp("model") / "LLaDA2.1-mini"
    write_checkpoint("llada2", folder, seed=2)
    engine = engines({"block_length": BLOCK}, model=str(folder))
    return engine, TinyModel.from_folder(folder)


def sample() -> list[BlockCase]:
    """Every length of a prompt's tail; texts that end inside a block and at its end."""
    return [
        BlockCase(
            make_prompt(length, seed=length),
            max_tokens=5 + 7 * length % 30,
            rule="joint",
            ignore_eos=length % 3 == 0,
        )
        for length in range(1, BLOCK + 1)
    ]


def test_parity(served: tuple[Engine, TinyModel]):
    engine, oracle = served
    cases = sample()
    wanted = [expect(case, oracle, engine) for case in cases]
    assert_equal(cases, run(engine, cases), wanted)
    alone = [run(engine, [case])[0] for case in cases[:2]]
    assert_equal(cases[:2], alone, wanted[:2])


def test_edits_happen(served: tuple[Engine, TinyModel]):
    """Else the test above would show nothing."""
    engine, _ = served
    without = {"strategy_config": RULES["joint"][1] | {"edit": False}}
    cases = [replace(case, ignore_eos=True) for case in sample()]
    edited = run(engine, cases)
    plain = engine.run(
        [case.prompt for case in cases],
        [
            SamplingParams(
                max_tokens=case.max_tokens,
                temperature=0.0,
                ignore_eos=True,
                extra_args={"dlm": {"strategy": "joint"} | without},
            )
            for case in cases
        ],
    )
    pairs = list(zip(edited, plain, strict=True))
    assert sum(one.tokens != other.tokens for one, other in pairs) > len(cases) // 2
    assert all(one.forwards > other.forwards for one, other in pairs)


def test_it_is_the_models_default(served: tuple[Engine, TinyModel]):
    engine, _ = served
    prompts = [make_prompt(length) for length in (3, 17, 40)]
    greedy = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}
    named = {"strategy": "joint", "strategy_config": {"preset": "quality"}}
    default = engine.run(prompts, SamplingParams(**greedy))
    explicit = engine.run(prompts, SamplingParams(**greedy, extra_args={"dlm": named}))
    assert default == explicit


def test_a_block_is_streamed_when_it_is_over(served: tuple[Engine, TinyModel]):
    """Never a token that a later step may change."""
    engine, oracle = served
    case = BlockCase(make_prompt(21), 2 * BLOCK + 3, rule="joint", ignore_eos=True)
    wanted = expect(case, oracle, engine)
    engine.add(case.prompt, case.params(output_kind=RequestOutputKind.DELTA))
    pieces = []
    while engine.busy:
        for output in engine.step():
            pieces.append(list(output.outputs[0].token_ids))
    assert [len(piece) for piece in pieces] == [BLOCK - 5, BLOCK, 8]
    if not wanted.near_tie:
        assert sum(pieces, []) == wanted.tokens


@dataclass(frozen=True)
class Exact:
    """One request with `reference_exact`."""

    prompt: tuple[int, ...]
    max_tokens: int
    config: dict[str, Any]
    """Of `joint`."""
    stops: bool

    @property
    def params(self) -> SamplingParams:
        dlm = {"reference_exact": True, "strategy_config": self.config}
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=0.0,
            ignore_eos=not self.stops,
            extra_args={"dlm": dlm},
        )


THRESHOLDS = {"quality": (0.7, 0.5), "speed": (0.5, 0.0)}
"""Of the model cards' presets."""


def exact_cases(
    numbers: Iterable[tuple[float, float, int] | tuple[str, int]],
) -> list[Exact]:
    """Two thresholds or a preset, and the most post steps, of each case."""
    cases = []
    for number, (*chosen, most) in enumerate(numbers):
        names = (
            ("preset",) if len(chosen) == 1 else ("mask_threshold", "edit_threshold")
        )
        config = dict(zip(names, chosen, strict=True)) | {"max_post_steps": most}
        prompt = make_prompt(1 + 5 * number % 40, seed=number)
        cases.append(Exact(prompt, 5 + 11 * number % 40, config, stops=number % 3 > 0))
    return cases


def check_exactly(engine: Engine, oracle: TinyModel, cases: list[Exact]) -> None:
    """All texts of one batch, and some of them alone.

    Where the published loop would never end, the text has no mask all the same.
    """
    got = engine.run([case.prompt for case in cases], [case.params for case in cases])
    compared = 0
    for case, result in zip(cases, got, strict=True):
        assert oracle.mask_id not in result.tokens, case
        config = dict(case.config)
        most = config.pop("max_post_steps")
        preset = THRESHOLDS.get(config.pop("preset", ""))
        mask, edit = preset or config.values()
        gaps: list[float] = []
        try:
            wanted, forwards = generate_llada21(
                oracle,
                list(case.prompt),
                max_tokens=case.max_tokens,
                block_length=BLOCK,
                mask_threshold=mask,
                edit_threshold=edit,
                max_post_steps=most,
                stops=case.stops,
                observe=gaps.append,
            )
        except NeverEnds:
            continue
        # Where masks come and go for longer than a block may take, it is cut short.
        if max(forwards) > 2 * BLOCK + most or min(gaps) < TIE:
            continue
        compared += 1
        assert result.tokens == wanted, case
        assert result.forwards == sum(forwards), case
    assert compared > 0.8 * len(cases)
    alone = [engine.run([case.prompt], [case.params])[0] for case in cases[::7]]
    assert alone == got[::7]


@pytest.mark.parametrize("times", fast(1, of=(1, 6)))
def test_whole_texts_are_the_published_loops(
    served: tuple[Engine, TinyModel], times: int
):
    """With `reference_exact`: the mask id is written, edited in, and written over."""
    low = [(0.3, 0.1, 3), (0.1, 0.0, 1), (0.05, 0.05, 16), (0.2, 0.1, 0)]
    check_exactly(*served, exact_cases([*low, ("quality", 16), ("speed", 2)] * times))


@pytest.mark.slow
def test_whole_texts_by_any_threshold(served: tuple[Engine, TinyModel]):
    numbers = product(
        (0.0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.95), (0.0, 0.05, 0.2, 0.9), (0, 1, 5, 64)
    )
    presets = product(THRESHOLDS, (0, 1, 2, 16))
    check_exactly(*served, exact_cases([*numbers, *presets]))
