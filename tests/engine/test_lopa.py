# SPDX-License-Identifier: Apache-2.0
"""LoPA on real engines against the oracle: tokens and forwards."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from engine.block_engines import BLOCK, BlockEngines
from engine.cases import make_prompt
from engine.harness import Engine, Finished, drive, params
from reference.llada import TinyLLaDA
from reference.lopa import Decoded, decode
from reference.network import TinyModel, block_causal
from reference.procedures import Statistics, row_statistics
from vllm.exceptions import VLLMValidationError

from vllm_dlm.model_executor.planning.branch_pages import most_branches


@dataclass(frozen=True)
class Asked:
    """One request."""

    prompt: tuple[int, ...]
    max_tokens: int
    length: int = 16
    """Positions that are decided together."""
    block: int = 16
    branches: int = 4
    threshold: float = 0.5
    ignore_eos: bool = True
    cache: str = "none"

    def params(self, **more: Any) -> Any:
        dlm = {
            "strategy": "lopa",
            "strategy_config": self.config(self.branches),
            "block_length": self.length,
            "cache": self.cache,
        }
        options = {"ignore_eos": self.ignore_eos, "dlm": dlm} | more
        return params(self.max_tokens, **options)

    def config(self, branches: int) -> dict[str, Any]:
        return {
            "branches": branches,
            "threshold": self.threshold,
            "block": self.block,
            "open_at": 0.3,
            "due_at": 0.6,
        }


def fitting(one: Asked, engine: Engine, *, end: int, length: int) -> int:
    scheduler = engine.scheduler
    return most_branches(
        one.branches,
        length=length,
        end=end,
        from_start=length == end,
        rows=scheduler.max_num_scheduled_tokens,
        longest=scheduler.max_model_len // scheduler._page_size,
        page_size=scheduler._page_size,
    )


def by_full_attention(one: Asked, model: TinyLLaDA, engine: Engine) -> Decoded:
    store = None

    def predict(row: list[int], start: int, end: int, is_first: bool) -> Statistics:
        nonlocal store
        rows = range(len(row))
        if one.cache != "none" and is_first:
            store = model.new_store(len(row))
        elif one.cache != "none":
            # Of branches each overwrites all that the one before has computed.
            rows = range(start, end if one.cache == "dual" else len(row))
        logits = model.forward([row[i] for i in rows], list(rows), store)
        return row_statistics(
            logits[start - rows.start : end - rows.start], model.mask_id
        )

    first, length = len(one.prompt), one.length
    end = first + -(-one.max_tokens // length) * length
    rows = {"none": end, "prefix": end - first, "dual": length}[one.cache]
    return decode(
        predict,
        list(one.prompt),
        list(range(first + length, end + 1, length)),
        mask_id=model.mask_id,
        stops=() if one.ignore_eos else {model.eos_id},
        **one.config(fitting(one, engine, end=end, length=rows)),
    )


def by_blocks(one: Asked, model: TinyModel, engine: Engine) -> Decoded:
    def predict(row: list[int], start: int, end: int, is_first: bool) -> Statistics:
        visible = block_causal(len(row), BLOCK, 0)
        logits = model.forward(row, visible=visible)
        return row_statistics(logits[start:end], model.mask_id)

    first = len(one.prompt) // BLOCK * BLOCK
    end = -(-(len(one.prompt) + one.max_tokens) // BLOCK) * BLOCK
    return decode(
        predict,
        list(one.prompt),
        list(range(first + BLOCK, end + 1, BLOCK)),
        mask_id=model.mask_id,
        whole_row=False,
        stops=() if one.ignore_eos else {model.eos_id},
        **one.config(fitting(one, engine, end=end, length=BLOCK)),
    )


def run(engine: Engine, asked: list[Asked], **more: Any) -> list[Finished]:
    return engine.run([a.prompt for a in asked], [a.params(**more) for a in asked])


def assert_equal(asked: list[Asked], got: list[Finished], wanted: list[Decoded]):
    close = 0
    for one, result, expected in zip(asked, got, wanted, strict=True):
        tokens = expected.tokens[: one.max_tokens]
        if result.tokens != tokens and expected.is_close:
            close += 1
            continue
        assert result.tokens == tokens, one
        assert result.forwards <= expected.forwards, one
        if len(expected.tokens) == one.max_tokens:
            assert result.forwards == expected.forwards, one
    assert close <= len(asked) // 10


FULL = [
    Asked(
        make_prompt(1 + 2 * number, number),
        # Whole blocks, but for some.
        max_tokens=(16, 32, 24, 20, 48)[number % 5],
        length=(16, 16, 24, 20, 24)[number % 5],
        block=(16, 5, 8, 20, 6)[number % 5],
        branches=(2, 3, 4, 5, 1)[number % 5],
        threshold=(0.4, 0.9, 0.2)[number % 3],
        ignore_eos=number % 3 != 1,
        cache=("none", "dual", "none", "prefix")[number % 4],
    )
    for number in range(20)
]


@pytest.fixture(scope="module")
def wanted(engine: Engine, oracle: TinyLLaDA) -> list[Decoded]:
    return [by_full_attention(one, oracle, engine) for one in FULL]


def test_full_attention(engine: Engine, wanted: list[Decoded]):
    """In a batch, in which some wait for room for all their branches, and alone."""
    assert_equal(FULL, run(engine, FULL), wanted)
    for number in range(0, len(FULL), 4):
        alone = run(engine, FULL[number : number + 1])
        assert_equal(FULL[number : number + 1], alone, wanted[number : number + 1])
    # Other branches than the canvas itself are kept, often.
    kept = [branch for one in wanted for branch in one.kept]
    assert sum(branch > 0 for branch in kept) > len(kept) / 8


@pytest.mark.slow
def test_among_others(engine: Engine, wanted: list[Decoded]):
    others = [
        params(40, dlm={"strategy": name, "block_length": 8}, ignore_eos=True)
        for name in ("freedave", "static")
    ]
    prompts = [p for one in FULL for p in (one.prompt, make_prompt(9), make_prompt(4))]
    sampling = [p for one in FULL for p in (one.params(), *others)]
    assert_equal(FULL, engine.run(prompts, sampling)[::3], wanted)


def test_preempted_at_any_time(engine: Engine, wanted: list[Decoded]):
    ids = [engine.add(one.prompt, one.params()) for one in FULL]
    source, hit = random.Random(5), 0

    def meddle(step: int) -> None:
        nonlocal hit
        running = [r for r in engine.scheduler.running if r.num_preemptions < 2]
        if running:
            engine.preempt(source.choice(running).request_id)
            hit += 1

    done = drive(engine, meddle)
    assert hit >= 10
    for number, expected in enumerate(wanted):
        if not expected.is_close:
            tokens = expected.tokens[: FULL[number].max_tokens]
            assert done[ids[number]].tokens == tokens


def test_one_branch_is_threshold_decoding(engine: Engine):
    asked = [Asked(make_prompt(5 + n, n), 32, branches=1) for n in range(5)]
    got = run(engine, asked)
    dlm = {
        "strategy": "threshold",
        "strategy_config": {"threshold": 0.5, "strict": True},
        "block_length": 16,
    }
    by_threshold = [params(32, dlm=dlm, ignore_eos=True) for _ in asked]
    others = engine.run([one.prompt for one in asked], by_threshold)
    assert [g.tokens for g in got] == [o.tokens for o in others]
    assert [g.forwards for g in got] == [o.forwards for o in others]


def test_a_batch_draws_what_one_request_draws(engine: Engine):
    asked = FULL[:8]
    together = run(engine, asked, temperature=0.8, seed=3)
    for one, result in zip(asked, together, strict=True):
        (alone,) = run(engine, [one], temperature=0.8, seed=3)
        assert (alone.tokens, alone.forwards) == (result.tokens, result.forwards)


def test_blocks(engines: Callable[..., Engine], tmp_path_factory):
    sdar = BlockEngines(engines, tmp_path_factory.getbasetemp(), "SDAR-4B-Chat-b16")
    engine = sdar()
    asked = [
        Asked(
            make_prompt(1 + 5 * number, number),
            max_tokens=(30, 47, 16)[number % 3],
            branches=(3, 4, 6)[number % 3],
            threshold=(0.4, 0.8)[number % 2],
            ignore_eos=number % 4 != 1,
        )
        for number in range(10)
    ]
    wanted = [by_blocks(one, sdar.oracle, engine) for one in asked]
    assert_equal(asked, run(engine, asked), wanted)
    assert_equal(asked[:2], [run(engine, [one])[0] for one in asked[:2]], wanted[:2])


def test_refused_with_other_caches(engine: Engine):
    dlm = {"strategy": "lopa", "cache": "vicinity"}
    with pytest.raises(VLLMValidationError, match="one of none, prefix, dual"):
        engine.run([make_prompt(5)], [params(8, dlm=dlm)])
