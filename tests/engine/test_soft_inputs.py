# SPDX-License-Identifier: Apache-2.0
"""Engines that are fed mixtures of tokens: dmax and smooth, against their oracles."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.cases import TIE, assert_equal, assert_same_tokens, make_prompt
from engine.families import Served, serving
from engine.harness import Engine, params
from engine.test_no_waits import Waits
from engine.test_structured import words
from engine.test_work_bounds import check_extremes
from reference.llada import TinyLLaDA
from reference.network import TinyModel
from reference.registered import NAMES, PLAIN
from reference.soft_inputs import Softly, generate_dmax, generate_smooth
from tiers import fast
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

BLOCK = 4
"""Of dmax: what a step feeds moves the next one's probabilities, of random weights by
some five times as much. After few steps of it two float32 programs still agree."""
LLADA2 = Served("llada2", "LLaDA2.0-mini", BLOCK, dlm={"block_length": BLOCK})
LLADA_MOE = Served("llada_moe", "LLaDA-MoE-7B-A1B-Instruct", 32)
SOFT = {"soft_inputs": True}


MANY = 10.0
"""Times the oracle's own rounding: what another float32 program may be off."""


@dataclass(frozen=True)
class Case:
    """One request."""

    prompt: tuple[int, ...]
    max_tokens: int
    strategy: str
    config: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
    """Of the request's options and the oracle's, beside the strategy's."""
    ignore_eos: bool = True

    def params(self, **options: Any) -> SamplingParams:
        dlm = {"strategy": self.strategy, "strategy_config": self.config} | self.more
        options = {"ignore_eos": self.ignore_eos} | options
        return params(self.max_tokens, dlm=dlm, **options)


@dataclass(frozen=True)
class Wanted:
    """What the oracle makes of a case."""

    tokens: list[int]
    forwards: int
    near_tie: bool
    """Rounding alone could have turned a decision."""
    inputs: list[torch.Tensor] = field(compare=False, repr=False)
    """Of each forward, the active block's, in float64."""
    rounding: list[float] = field(compare=False, repr=False)
    """How far they are from those in float32."""

    @classmethod
    def of(cls, case: Case, oracle: TinyLLaDA | TinyModel) -> Wanted:
        double = type(oracle)(
            oracle.config, {name: w.double() for name, w in oracle.weights.items()}
        )
        found, exact = cls._decoded(case, oracle), cls._decoded(case, double)
        rounding = [
            float((one - other).abs().max()) if one.shape == other.shape else 1.0
            for one, other in zip(found.inputs, exact.inputs, strict=False)
        ]
        near_tie = found.tokens != exact.tokens
        near_tie |= found.gap < max(TIE, *rounding)
        return cls(found.tokens, found.forwards, near_tie, exact.inputs, rounding)

    @staticmethod
    def _decoded(case: Case, oracle: TinyLLaDA | TinyModel) -> Softly:
        options = {
            "max_tokens": case.max_tokens,
            "stops": not case.ignore_eos,
            **case.config,
            **case.more,
        }
        if case.strategy == "dmax":
            assert isinstance(oracle, TinyModel)
            options |= {"block_length": BLOCK}
            return generate_dmax(oracle, list(case.prompt), **options)
        return generate_smooth(oracle, list(case.prompt), **options)


def dmax(number: int, **config: Any) -> Case:
    return Case(
        make_prompt(1 + 5 * number % 23, seed=number),
        3 + 7 * number % 26,
        "dmax",
        # Random weights: lower than what a trained model reaches.
        {"threshold": 0.2, "sure": 0.6} | config,
        ignore_eos=number % 3 != 0,
    )


def smooth(number: int, cache: str, **config: Any) -> Case:
    return Case(
        make_prompt(1 + 5 * number % 23, seed=number),
        5 + 7 * number % 26,
        "smooth",
        {"threshold": 0.4, "threshold_decay": 0.3} | config,
        {"cache": cache, "block_length": 16},
        ignore_eos=number % 3 != 0,
    )


def run(engine: Engine, cases: list[Case]):
    return engine.run([one.prompt for one in cases], [one.params() for one in cases])


@pytest.fixture(scope="module")
def llada2(
    engines: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, TinyModel]:
    """Served by DMax, few pages."""
    serve = serving(engines, tmp_path_factory.getbasetemp() / "families")
    served = Served(
        LLADA2.family,
        LLADA2.folder,
        BLOCK,
        dlm={"block_length": BLOCK, "strategy": "dmax"} | SOFT,
    )
    return serve(served, num_gpu_blocks_override=13)


@pytest.fixture(scope="module")
def llada_moe(
    engines: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, TinyModel]:
    serve = serving(engines, tmp_path_factory.getbasetemp() / "families")
    served = Served(LLADA_MOE.family, LLADA_MOE.folder, 32, dlm=SOFT)
    return serve(served)


@pytest.fixture(scope="module")
def llada(engines: Callable[..., Engine]) -> Engine:
    return engines(dlm=SOFT)


@contextmanager
def watched(engine: Engine) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Positions and input embeddings of each forward."""
    embeddings = engine.runner.model_state._embeddings
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    make = embeddings.of

    def noting(plan, input_ids, positions, group_of, num_rows):
        made = make(plan, input_ids, positions, group_of, num_rows)
        seen.append((positions.clone(), made[: len(input_ids)].clone()))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "of", noting)
        yield seen


def check(engine: Engine, oracle: TinyLLaDA | TinyModel, cases: list[Case]) -> None:
    """Tokens and forwards in a batch and alone; alone, the inputs of each forward."""
    wanted = [Wanted.of(case, oracle) for case in cases]
    assert sum(one.near_tie for one in wanted) <= len(cases) // 2
    assert_equal(cases, run(engine, cases), wanted, near_ties=len(cases))
    compared = 0
    for case, expected in list(zip(cases, wanted, strict=True))[:4]:
        with watched(engine) as seen:
            got = run(engine, [case])
        assert_equal([case], got, [expected], near_ties=1)
        if expected.near_tie:
            continue
        pairs = zip(seen, expected.inputs, expected.rounding, strict=False)
        for (_, rows), inputs, rounding in pairs:
            # The block is somewhere in the forward's rows.
            width = len(inputs)
            off = (rows.double().unfold(0, width, 1).transpose(1, 2) - inputs).abs()
            assert off.amax(dim=(1, 2)).min() < 1e-6 + MANY * rounding
            compared += rounding < 1e-4
    assert compared > 10


def test_dmax_is_its_oracle(llada2: tuple[Engine, TinyModel]):
    engine, oracle = llada2
    cases = [dmax(number) for number in range(8)]
    check(engine, oracle, cases + [dmax(3, soft=False), dmax(7, soft=False)])


def test_mixtures_change_texts(llada2: tuple[Engine, TinyModel]):
    """Else the test above would show nothing."""
    engine, _ = llada2
    soft = run(engine, [dmax(number) for number in range(1, 12, 3)])
    hard = run(engine, [dmax(number, soft=False) for number in range(1, 12, 3)])
    assert sum(a.tokens != b.tokens for a, b in zip(soft, hard, strict=True)) > 1


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_smooth_is_its_oracle(llada: Engine, oracle: TinyLLaDA, cache: str):
    check(llada, oracle, [smooth(number, cache) for number in range(1, 7)])


def test_smooth_with_experts(llada_moe: tuple[Engine, TinyModel]):
    engine, oracle = llada_moe
    check(engine, oracle, [smooth(number, "dual") for number in range(1, 6)])


def test_without_weight_it_writes_what_threshold_does(llada: Engine):
    """With a bound that does not fall."""
    flat = {"threshold_decay": 1.0, "weight_start": 0.0, "weight_growth": 0.0}
    cases = [smooth(n, "none", **flat, threshold=0.999) for n in range(1, 7)]
    plain = [
        replace(one, strategy="threshold", config={"threshold": 0.999}) for one in cases
    ]
    got, wanted = run(llada, cases), run(llada, plain)
    assert [one.tokens for one in got] == [one.tokens for one in wanted]


@pytest.mark.parametrize("steps", fast(5, of=(2, 5, 6)))
def test_preempted_requests_write_the_same(
    llada2: tuple[Engine, TinyModel], steps: int
):
    """Their blocks are replayed, mixtures and all."""
    engine, oracle = llada2
    cases = [dmax(2), dmax(4), dmax(7)]
    ids = [engine.add(case.prompt, case.params()) for case in cases]
    for _ in range(steps):
        engine.step()
    running = list(engine.scheduler.running)
    assert running
    for request in running[:2]:
        engine.preempt(request.request_id)
    done = engine.drive(lambda step: None)
    wanted = [Wanted.of(case, oracle) for case in cases]
    assert_same_tokens([done[one].outputs[0].token_ids for one in ids], wanted)


def test_final_keys_are_of_tokens(llada2: tuple[Engine, TinyModel]):
    """Each position's last input is the embedding of what stands there."""
    engine, oracle = llada2
    case = Case(make_prompt(13), 3 * BLOCK + 3, "dmax", {"threshold": 0.2, "sure": 0.6})
    with watched(engine) as seen:
        tokens = run(engine, [case])[0].tokens
    last = {}
    soft = 0
    vectors = oracle.embedding
    for positions, rows in seen:
        for position, row in zip(positions.tolist(), rows, strict=True):
            last[position] = row
            soft += bool((vectors - row).abs().amax(dim=1).min() > 1e-3)
    text = [*case.prompt, *tokens]
    # The last block's keys are needed by nobody.
    for position in range((len(text) - 1) // BLOCK * BLOCK):
        torch.testing.assert_close(last[position], vectors[text[position]])
    assert soft > 3


def test_mixed_with_others_and_drawn(llada2: tuple[Engine, TinyModel]):
    """A batch of strategies; a temperature; log-probabilities; a bias."""
    engine, _ = llada2
    joint = Case(make_prompt(9), 20, "joint", {"mask_threshold": 0.3})
    cases = [dmax(1), joint, dmax(2), dmax(4), dmax(5)]
    asked: list[dict[str, Any]] = [
        {},
        {},
        {"temperature": 0.8, "seed": 3},
        {"logprobs": 2},
        {"logit_bias": {7: 3.0}, "temperature": 0.5, "seed": 1},
    ]
    sampling = [c.params(**more) for c, more in zip(cases, asked, strict=True)]
    together = engine.run([one.prompt for one in cases], sampling)
    for case, one, got in zip(cases, sampling, together, strict=True):
        assert engine.run([case.prompt], one)[0].tokens == got.tokens
        assert len(got.tokens) <= case.max_tokens


def test_texts_match_patterns(llada2: tuple[Engine, TinyModel], llada: Engine):
    from vllm.sampling_params import StructuredOutputsParams

    pattern = StructuredOutputsParams(regex=r"(t\d){3,5}")
    for engine, case in ((llada2[0], dmax(1)), (llada, smooth(1, "none"))):
        sampling = case.params(structured_outputs=pattern, ignore_eos=False)
        tokens = engine.run([case.prompt], sampling)[0].tokens
        assert re.fullmatch(r"(t\d){3,5}", words(tokens))


def test_servers_without_are_told_the_flag(engine: Engine):
    for name in ("smooth", "dmax"):
        with pytest.raises(VLLMValidationError, match="with --dlm-soft-inputs"):
            engine.run([make_prompt(4)], params(8, dlm={"strategy": name}))
    assert engine.runner.model_state._embeddings is None


def test_dmax_without_mixtures_needs_none(engines: Callable[..., Engine]):
    """Nor any other model's server."""
    hard = {"strategy": "dmax", "strategy_config": {"soft": False}}
    got = engines().run([make_prompt(9)], params(20, dlm=hard))
    assert len(got[0].tokens) <= 20


def test_the_server_names_it_at_start(checkpoint: Path):
    from vllm import LLM

    with pytest.raises(ValueError, match="start it with --dlm-soft-inputs"):
        LLM(
            model=str(checkpoint),
            dtype="float32",
            additional_config={"dlm": {"strategy": "smooth"}},
        )


def test_tiles_and_the_number_of_requests_change_nothing(llada: Engine):
    """Mixtures are made a tile of logits at a time."""
    cases = [smooth(number, "none") for number in range(1, 7)]
    wanted = run(llada, cases)
    rows = llada.runner.sampler.facts
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vars(rows), "tile_rows", 7)
        assert run(llada, cases) == wanted


def test_steps_scheduled_ahead_are_fed_the_same(
    engines: Callable[..., Engine], llada2: tuple[Engine, TinyModel]
):
    """What a forward is fed is found on the device, also where it was guessed."""
    engine, oracle = llada2
    folder = engine.llm.llm_engine.model_config.model
    dlm = {"block_length": BLOCK, "strategy": "dmax"} | SOFT
    ahead = engines(dlm, model=folder, async_scheduling=True)
    cases = [dmax(number) for number in range(1, 6)]
    wanted = [Wanted.of(case, oracle) for case in cases]
    assert_same_tokens([one.tokens for one in run(ahead, cases)], wanted)


@pytest.mark.slow
def test_compiled_steps_are_fed_the_same(
    engines: Callable[..., Engine], llada2: tuple[Engine, TinyModel], llada: Engine
):
    engine, oracle = llada2
    folder = engine.llm.llm_engine.model_config.model
    dlm = {"block_length": BLOCK, "compile": "dmax,smooth"} | SOFT
    compiled = engines(dlm, model=folder)
    cases = [dmax(number, threshold=0.5, sure=0.9) for number in range(1, 9)]
    assert run(compiled, cases) == run(engine, cases)
    groups = compiled.runner.sampler.groups.expected()
    assert {group.strategy.name for group in groups} == {"dmax", "smooth"}
    assert all(group.function.compiled for group in groups)


def test_extremes(llada: Engine):
    names = [name for name in NAMES if name not in PLAIN]
    assert names == ["dmax", "smooth"]
    check_extremes(llada, names)


def test_steps_do_not_wait(llada2: tuple[Engine, TinyModel], llada: Engine):
    for engine, cases in (
        (llada2[0], [dmax(1), dmax(2)]),
        (llada, [smooth(1, "dual"), smooth(2, "none")]),
    ):
        for number, case in enumerate(cases):
            sampling = case.params(temperature=number * 0.7, ignore_eos=True)
            engine.add(case.prompt, sampling)
        engine.step()  # what is made of a request once
        with Waits() as waits:
            for _ in range(3):
                engine.step()
        while engine.busy:
            engine.step()
        assert not waits.seen
