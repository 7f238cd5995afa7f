# SPDX-License-Identifier: Apache-2.0
"""Requests decoded with FreeDave and by `static`, and what must be equal."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine.cases import make_prompt
from engine.harness import Engine, Finished, params
from reference.checkpoints import write_checkpoint
from vllm import SamplingParams

from vllm_dlm import step_map


@dataclass(frozen=True)
class Asked:
    """One request, to be decoded by any strategy."""

    prompt: tuple[int, ...]
    max_tokens: int = 40
    drafts: int = 4
    block: int | None = None
    ignore_eos: bool = True
    temperature: float = 0.0
    seed: int = 0
    cache: str = "none"
    exact: bool = False
    """The option `reference_exact`."""
    eager: bool = False
    """Drafts in the blocks to come; then without a step map."""

    def by(self, strategy: str, **config: Any) -> SamplingParams:
        dlm: dict[str, Any] = {
            "strategy": strategy,
            "strategy_config": config,
            "cache": self.cache,
            "reference_exact": self.exact,
            "step_map": not self.eager,
        }
        if self.block is not None:
            dlm["block_length"] = self.block
        return params(
            self.max_tokens,
            dlm=dlm,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            seed=self.seed,
            logprobs=1,
        )

    def drafted(self, **config: Any) -> SamplingParams:
        config |= {"drafts": self.drafts, "eager": self.eager}
        return self.by("freedave", **config)


def run(
    engine: Engine, asked: Sequence[Asked], by: Callable[[Asked], SamplingParams]
) -> list[Finished]:
    return engine.run([one.prompt for one in asked], [by(one) for one in asked])


def one_by_one(
    engine: Engine, asked: Sequence[Asked], by: Callable[[Asked], SamplingParams]
) -> list[Finished]:
    return [run(engine, [one], by)[0] for one in asked]


def static(one: Asked) -> SamplingParams:
    """One token per step."""
    return one.by("static")


def assert_nothing_is_lost(
    asked: Sequence[Asked], got: Sequence[Finished], wanted: Sequence[Finished]
) -> None:
    """Tokens, log-probabilities, their steps where asked, and no more forwards."""
    for one, result, expected in zip(asked, got, wanted, strict=True):
        assert result.tokens == expected.tokens, one
        if not one.eager:
            ours, theirs = step_map(result.output), step_map(expected.output)
            assert ours.steps == theirs.steps, one
            assert ours.beyond == theirs.beyond, one
            assert not any(ours.edited)
        assert result.forwards <= expected.forwards, one
        for ours, theirs in zip(
            result.output.logprobs, expected.output.logprobs, strict=True
        ):
            assert list(ours) == list(theirs)
            for token in ours:
                assert ours[token].rank == theirs[token].rank
                wanted_value = pytest.approx(theirs[token].logprob, abs=1e-4)
                assert ours[token].logprob == wanted_value


def forwards(results: Sequence[Finished]) -> int:
    return sum(result.forwards for result in results)


def compare(engine: Engine, asked: Sequence[Asked]) -> None:
    """Together, alone, among others: as `static` alone, in fewer forwards."""
    wanted = one_by_one(engine, asked, static)
    together = run(engine, asked, Asked.drafted)
    assert_nothing_is_lost(asked, together, wanted)
    assert forwards(together) < forwards(wanted)
    alone = one_by_one(engine, asked[:2], Asked.drafted)
    assert_nothing_is_lost(asked[:2], alone, wanted[:2])

    asked, wanted = asked[:3], wanted[:3]
    others = [one.by("threshold", threshold=0.3) for one in asked]
    solo = [engine.run([o.prompt], p)[0] for o, p in zip(asked, others, strict=True)]
    mixed = engine.run(
        [one.prompt for one in asked for _ in range(2)],
        [
            p
            for one, other in zip(asked, others, strict=True)
            for p in (one.drafted(), other)
        ],
    )
    assert_nothing_is_lost(asked, mixed[::2], wanted)
    assert mixed[1::2] == solo


FAMILIES = {
    "SDAR-4B-Chat": ("sdar", 4, {}),
    "SDAR-30B-A3B-Chat-b8": ("sdar_moe", 8, {}),
    # Blocks are seeded; parts of 8 are decided together.
    "Fast_dLLM_v2_7B": ("fast_dllm_v2", 16, {"bd_size": 16}),
    # Blocks are counted from the prompt's end: a block begins anywhere in a page.
    "Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm-v0.1": ("a2d_qwen2", 8, {}),
    "Nemotron-Labs-Diffusion-8B": ("nemotron", 8, {"block_size": 8, "head_dim": 64}),
}
"""Folder -> family, block length, entries of config.json."""


def block_sample(name: str, drafts: Sequence[int], eager: bool = False) -> list[Asked]:
    """Prompts of every residue mod B; texts that end inside a block.

    Args:
        name: of `FAMILIES`.
        drafts: numbers of drafts, of which each request has one.
    """
    source = random.Random(name)
    _, block, _ = FAMILIES[name]
    return [
        Asked(
            make_prompt(length, seed=length),
            max_tokens=source.randint(block, 4 * block + 3),
            drafts=source.choice(drafts),
            ignore_eos=length % 3 != 0,
            temperature=0.7 * (length % 4 == 1),
            seed=length,
            eager=eager,
        )
        for length in range(2 * block, 3 * block)
    ]


Serve = Callable[..., Engine]


def serving(engines: Serve, parent: Path) -> Serve:
    """`serve(name, **options)`: an engine with a random model of `FAMILIES`."""

    def start(name: str, **options: Any) -> Engine:
        family, block, changes = FAMILIES[name]
        if not (parent / name).exists():
            write_checkpoint(family, parent / name, seed=2, **changes)
        dlm = {"block_length": block}
        return engines(dlm, model=str(parent / name), **options)

    return start


def room_in(engine: Engine) -> Callable[[int, int, int], int]:
    """Canvases that the context has room for, by rows [start, end) and keys."""
    page = engine.scheduler.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    most = engine.scheduler.max_model_len // page

    def room(start: int, end: int, length: int) -> int:
        return 1 + (most - -(-length // page)) // (-(-end // page) - start // page)

    return room


@contextmanager
def branches_of(engine: Engine) -> Iterator[list[int]]:
    """Branches of all requests in each forward, their canvases among them."""
    runner, seen = engine.runner, []
    prepare = runner.model_state.prepare_inputs

    def note(input_batch: Any, req_states: Any) -> Any:
        drafts = input_batch.num_draft_tokens_per_req
        seen.append(input_batch.num_reqs + (0 if drafts is None else int(drafts.sum())))
        return prepare(input_batch, req_states)

    runner.model_state.prepare_inputs = note
    try:
        yield seen
    finally:
        del runner.model_state.prepare_inputs
