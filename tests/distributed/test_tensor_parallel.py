# SPDX-License-Identifier: Apache-2.0
"""Two workers give one worker's tokens: as processes, and as actors of a Ray cluster.

Sums over hidden sizes are split between workers, so that float32 logits differ in the
last digits. What may differ for that is what the oracle calls a near-tie; nothing is.
The last tests here kill a worker.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed.workers import youngest_workers
from engine import block_cases
from engine.block_cases import BlockCase
from engine.cases import Case, assert_equal, expect, make_prompt, run_cases
from engine.harness import Engine, params
from engine.test_frames import watched
from engine.test_soft_inputs import BLOCK as DMAX_BLOCK
from engine.test_soft_inputs import Wanted, dmax, smooth
from engine.test_soft_inputs import run as run_soft
from reference.diffusion_gemma import write_random_checkpoint as write_gemma
from reference.llada import TinyLLaDA, write_tokenizer
from reference.network import TinyModel
from vllm.sampling_params import StructuredOutputsParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
"""One test starts six engines, some of two workers."""

BACKENDS = ("mp", "ray")
Engines = Callable[..., Engine]

FULL = [
    Case(make_prompt(length, 5), rule, cache, block, max_tokens=40)
    for length, block, cache in ((1, 16, "none"), (7, 16, "dual"), (40, 32, "none"))
    for rule in (
        "static/low_confidence",
        "threshold",
        "entropy",
        "eb",
        "learn2pd/token",
        "klass",
        "joint/edit",
    )
]
"""Rules that read confidences, entropies, margins, whole rows (klass); that rewrite."""

BLOCK_CAUSAL = [
    BlockCase(make_prompt(length, 5), 40, rule)
    for length in (3, 16, 37)
    for rule in ("static", "entropy", "threshold", "joint")
]


def test_full_attention(engines: Engines, llada: Path, backend: str):
    """The oracle's tokens and forwards, as one worker's."""
    oracle = TinyLLaDA.from_folder(llada)
    expected = [expect(case, oracle) for case in FULL]
    one = run_cases(engines(llada, "mp", 1), FULL)
    two = run_cases(engines(llada, backend, 2), FULL)
    assert_equal(FULL, one, expected)
    assert_equal(FULL, two, expected)


def test_block_attention(engines: Engines, sdar: Path, backend: str):
    one = block_cases.run(engines(sdar, "mp", 1), BLOCK_CAUSAL)
    two = block_cases.run(engines(sdar, backend, 2), BLOCK_CAUSAL)
    assert len({tuple(result.tokens) for result in one}) > len(BLOCK_CAUSAL) // 2
    assert two == one


def test_mixtures_of_tokens(engines: Engines, llada: Path, llada2: Path, backend: str):
    """Each worker mixes its part of the vocabulary, of `smooth`; and `dmax` two tokens,
    of which one may be the other worker's.

    `dmax` revises all tokens in every step, and goes on from what rounding has turned.
    """
    for folder, oracle, options, cases in (
        (
            llada,
            TinyLLaDA.from_folder(llada),
            {},
            [smooth(number, "dual") for number in range(1, 9)],
        ),
        (
            llada2,
            TinyModel.from_folder(llada2),
            {"block_length": DMAX_BLOCK},
            [dmax(number) for number in range(12)],
        ),
    ):
        wanted = [Wanted.of(case, oracle) for case in cases]
        near_ties = sum(one.near_tie for one in wanted)
        assert near_ties <= len(cases) // 2
        engine = engines(folder, backend, 2, soft_inputs=True, **options)
        assert_equal(cases, run_soft(engine, cases), wanted, near_ties)


def test_diffusion_gemma(
    engines: Engines, tmp_path_factory: pytest.TempPathFactory, backend: str
):
    """Canvases whose every step mixes all tokens, each worker's half of them; drawn,
    greedy, with rows that are restricted, and with texts that must match a pattern."""
    folder = tmp_path_factory.getbasetemp() / "diffusion-gemma"
    if not folder.exists():
        write_gemma(folder, seed=0, canvas_length=16)
        words = {"vocab_size": 128, "mask_token_id": 124, "eos_token_id": 1}
        write_tokenizer(folder, **words, max_length=256)
    plain = {"ignore_eos": True, "detokenize": False}
    sampling = [
        params(32, temperature=temperature, seed=seed, **plain, **more)
        for seed, (temperature, more) in enumerate(
            [(1.0, {}), (0.0, {}), (0.7, {}), (1.0, {"logprobs": 2})]
            + [(1.0, {"top_k": 20, "min_p": 0.01, "logit_bias": {3: 2.0}})]
        )
    ]
    words = StructuredOutputsParams(regex=r"t6(t[2-4]|t5\d){9,30}")
    sampling += [
        params(32, temperature=heat, seed=7, structured_outputs=words, **more)
        for heat, more in (
            (1.0, {}),
            (0.6, {"logit_bias": {2: 3.0, 120: 1.0}}),
            (0.0, {}),
            (1.0, {"top_k": 5}),
        )
    ]
    prompts = [make_prompt(length, 5) for length in (3, 9, 5, 12, 7, 4, 6, 8, 10)]
    one, two = (
        engines(folder, how, degree, diffusion_gemma="engine").run(prompts, sampling)
        for how, degree in (("mp", 1), (backend, 2))
    )
    assert len({tuple(found.tokens) for found in one}) == len(prompts)
    assert two == one


def test_drawn_tokens_and_log_probabilities(
    engines: Engines, llada: Path, backend: str
):
    """Each worker draws for itself: the same token, or the next forward is wrong."""
    limits = ({}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05})
    sampling = [
        params(
            24,
            dlm={"block_length": 8, "strategy": strategy},
            seed=seed,
            temperature=0.8,
            ignore_eos=True,
            logprobs=3,
            **limits[seed % 4],
        )
        for seed, strategy in enumerate(["threshold", "static", "entropy"] * 4)
    ]
    prompts = [make_prompt(9, 1)] * len(sampling)
    one = engines(llada, "mp", 1).run(prompts, sampling)
    two = engines(llada, backend, 2).run(prompts, sampling)
    assert len({tuple(result.tokens) for result in one}) == len(one)
    assert two == one
    for alone, shared in zip(one, two, strict=True):
        pairs = zip(alone.output.logprobs, shared.output.logprobs, strict=True)
        for wanted, got in pairs:
            assert got.keys() == wanted.keys()
            for token, entry in got.items():
                assert entry.logprob == pytest.approx(wanted[token].logprob, abs=1e-4)
                assert entry.rank == wanted[token].rank


def test_all_workers_use_the_first_ones_filter(
    engines: Engines, llada: Path, backend: str
):
    """Though a further one has none, as where it runs on another machine."""

    def lose_filters(worker: Any) -> None:
        if worker.rank > 0:
            worker.model_runner.model_state.model_config.model = "elsewhere"

    cases = [
        Case(make_prompt(length, 5), "learn2pd/token", "prefix", 8, max_tokens=40)
        for length in (1, 9, 30)
    ]
    one, two = engines(llada, "mp", 1), engines(llada, backend, 2)
    two.llm.collective_rpc(lose_filters)
    assert run_cases(two, cases) == run_cases(one, cases)


def test_frames(engines: Engines, llada: Path, backend: str):
    """One worker tells of what both have decided."""
    cases = FULL[:14]
    with watched() as replay:
        results = run_cases(engines(llada, backend, 2), cases)
    for number, result in enumerate(results):
        replay.check(result.output, number)


@pytest.mark.parametrize("model", ["llada", "sdar"])
def test_texts_that_match_a_pattern(
    engines: Engines, model: str, backend: str, request: pytest.FixtureRequest
):
    """Each worker finds the path for itself, of statistics of classes of tokens, which
    lie in both halves of the vocabulary."""
    folder = request.getfixturevalue(model)
    patterns = [r"(t\d)+", r"t8(t[2-4]|t9\d){3,9}t5", r"(t7t8|t9)(t6\d)*"]
    strategies = ["threshold", "static", "entropy", "eb"]
    sampling = [
        params(
            40,
            dlm={"strategy": strategies[number % 4]},
            structured_outputs=StructuredOutputsParams(regex=patterns[number % 3]),
            seed=number,
            temperature=number % 2 * 0.8,
        )
        for number in range(12)
    ]
    prompts = [make_prompt(3 + number, 5) for number in range(12)]
    alone = engines(folder, "mp", 1)
    end = alone.llm.get_tokenizer().eos_token_id
    two = engines(folder, backend, 2).run(prompts, sampling)
    assert two == alone.run(prompts, sampling)
    for number, result in enumerate(two):
        text = "".join(f"t{token}" for token in takewhile(end.__ne__, result.tokens))
        assert re.fullmatch(patterns[number % 3], text), (number, text)


def test_a_lost_worker_ends_requests_with_an_error(
    engines: Engines, sdar: Path, backend: str
):
    """Last in this file: the engine is gone afterwards."""
    from vllm.v1.engine.exceptions import EngineDeadError

    engine = engines(sdar, backend, 2)
    long = params(200, dlm={"strategy": "static"}, ignore_eos=True)
    for number in range(4):
        engine.add(make_prompt(10, number), long)
    engine.step()
    workers = youngest_workers(backend, 2)
    workers[1].kill()
    finished = []
    with pytest.raises(EngineDeadError):
        while engine.busy:
            finished += [output for output in engine.step() if output.finished]
    assert not finished
    # The other worker, which waits for the lost one, is ended as well.
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    with pytest.raises(EngineDeadError):
        engine.run([make_prompt(3)], params(8))
