# SPDX-License-Identifier: Apache-2.0
"""`vicinity` and `window`: tokens, forwards, rows, and what a preemption replays."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from engine.cases import RULES, Case, assert_equal, expect, make_prompt, run_cases
from engine.harness import Engine
from engine.test_counts import counting
from reference.cached_procedures import MOVING_CACHES
from reference.checkpoints import write_checkpoint
from reference.llada import TinyLLaDA
from reference.network import TinyModel
from reference.window_diffusion import generate_windows
from tiers import fast

SMALL: dict[str, list[dict[str, int]]] = {
    "vicinity": [
        {},
        {"look_back": 5, "look_ahead": 7, "warmup_steps": 2},
        {"look_back": 0, "look_ahead": 0, "warmup_steps": 0},
    ],
    "window": [
        {},
        {"active_window": 6, "external_window": 11, "refresh_every": 5},
        {"active_window": 1, "external_window": 1, "refresh_every": 32},
        {"active_window": 9, "external_window": 30, "refresh_every": 3},
        {"active_window": 4, "external_window": 6, "early_stop": True},
    ],
}
"""The usual parameters, and others that tiny requests notice."""


def make_cases(cache: str, blocks: tuple[int, ...], rules: tuple[str, ...]):
    """Every rule, with prompts of 1 to 70 tokens and one to four blocks."""
    source = random.Random(f"{cache}:{blocks}")
    configs = SMALL[cache]
    cases = []
    for number, rule in enumerate(rules):
        block = blocks[number % len(blocks)]
        cases.append(
            Case(
                make_prompt(source.randint(1, 70), seed=number),
                rule=rule,
                cache=cache,
                block=block,
                max_tokens=block * source.randint(1, max(64 // block, 1))
                - number % 3 * (number % 2),
                ignore_eos=number % 3 == 0,
                seed=number,
                cache_config=configs[(number + block // 8) % len(configs)],
            )
        )
    return cases


def check(engine: Engine, oracle, cases: list[Case], **options) -> None:
    """All cases eight at a time, and some of them again, one at a time."""
    wanted = [expect(case, oracle, **options) for case in cases]
    assert_equal(cases, run_cases(engine, cases), wanted)
    alone = random.Random(0).sample(range(len(cases)), 2)
    cases = [cases[i] for i in alone]
    got = [run_cases(engine, [case])[0] for case in cases]
    assert_equal(cases, got, [wanted[i] for i in alone])


QUICK = [("vicinity", 16, 4), ("window", 16, 4)]
PARITY = [*QUICK, *itertools.product(MOVING_CACHES, (8, 16, 32, 48), (1,))]


@pytest.mark.parametrize(("cache", "block", "every"), fast(*QUICK, of=PARITY))
def test_parity(engine: Engine, oracle: TinyLLaDA, cache: str, block: int, every: int):
    """48 is the whole canvas; Learn2PD's tests have no filter of that length."""
    rules = [rule for rule in RULES if block < 48 or not rule.startswith("learn2pd")]
    check(engine, oracle, make_cases(cache, (block,), tuple(rules[::every])))


@pytest.fixture(scope="module")
def dream_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dream") / "Dream-v0-Instruct-7B"
    return write_checkpoint("dream", folder, seed=5)


@pytest.mark.parametrize("cache", fast("window", of=MOVING_CACHES))
def test_parity_with_a_shift(
    engines: Callable[..., Engine], dream_folder: Path, cache: str
):
    """Each position is predicted by the row to its left, which is computed too."""
    engine = engines(model=str(dream_folder))
    oracle = TinyModel.from_folder(dream_folder)
    rules = ("static/low_confidence", "threshold", "klass", "localleap", "joint/edit")
    cases = make_cases(cache, (8, 16, 48, 32), rules)
    check(engine, oracle, cases, shift=1)


def published(number: int) -> tuple[Case, dict[str, int]]:
    """A request of the published loop, and its windows."""
    source = random.Random(f"published:{number}")
    active = source.choice((1, 2, 5, 16))
    windows = {
        "active_window": active,
        "external_window": active + source.choice((0, 3, 20)),
        "refresh_every": source.choice((1, 4, 32)),
        "early_stop": number % 3 < 2,
    }
    width = source.randint(1, 60)
    case = Case(
        make_prompt(source.choice((1, 2, 30)), seed=number),
        rule="static/entropy",
        cache="window",
        block=width,
        max_tokens=width,
        ignore_eos=number % 4 == 3,
        cache_config=windows,
    )
    return case, windows


@pytest.mark.parametrize("shift", fast(1, of=(0, 1)))
@pytest.mark.slow
def test_the_published_loop_of_windows(
    engines: Callable[..., Engine],
    oracle: TinyLLaDA,
    dream_folder: Path,
    shift: int,
):
    """Tokens, forwards and rows: eight at a time, and alone."""
    engine = engines(model=str(dream_folder)) if shift else engines()
    model = TinyModel.from_folder(dream_folder) if shift else oracle
    mask_id = engine.scheduler.dlm_defaults.mask_token_id
    ban = {"logit_bias": {mask_id: -100.0}} if shift else {}
    cases, wanted, cut = [], [], 0
    for number in range(24):
        case, windows = published(number)
        loop = generate_windows(
            model,
            list(case.prompt),
            gen_length=case.max_tokens,
            external=windows["external_window"],
            active=windows["active_window"],
            refresh_every=windows["refresh_every"],
            early_stop=bool(windows["early_stop"]),
            ends=not case.ignore_eos,
            shift=shift,
            counts_mask=shift == 1,
        )
        cut += windows["early_stop"] and len(loop.tokens) < case.max_tokens
        cases.append(case)
        wanted.append(loop)
    assert cut
    sampling = [case.params(reference_exact=shift == 1, **ban) for case in cases]
    got = engine.run([case.prompt for case in cases], sampling)
    for case, result, loop in zip(cases, got, wanted, strict=True):
        assert (result.tokens, result.forwards) == (loop.tokens, loop.forwards), case
    for number in range(3):
        with counting(engine) as counts:
            (alone,) = engine.run([cases[number].prompt], [sampling[number]])
        assert alone.tokens == wanted[number].tokens
        assert counts.rows == [end - start for start, end in wanted[number].rows]


@pytest.mark.parametrize("cache", fast("window", of=("prefix", "dual", *MOVING_CACHES)))
def test_a_prompt_of_one_token(
    engines: Callable[..., Engine], dream_folder: Path, cache: str
):
    """Rows that begin at position 0 need not be those of the whole canvas."""
    engine = engines(model=str(dream_folder))
    oracle = TinyModel.from_folder(dream_folder)
    cases = [
        Case(
            make_prompt(length, length),
            cache=cache,
            block=8,
            max_tokens=40,
            ignore_eos=True,
        )
        for length in range(1, 5)
    ]
    wanted = [expect(case, oracle, shift=1) for case in cases]
    assert_equal(cases, run_cases(engine, cases), wanted)


@pytest.mark.parametrize("cache", fast("window", of=MOVING_CACHES))
def test_canvas_after_canvas(small_engine: Engine, oracle: TinyLLaDA, cache: str):
    cases = [
        Case(
            make_prompt(3 + 5 * number, number),
            rule=rule,
            cache=cache,
            block=16,
            max_tokens=70,
            ignore_eos=True,
            cache_config=config,
        )
        for number, (rule, config) in enumerate(
            zip(("static/margin", "threshold", "eb"), SMALL[cache], strict=False)
        )
    ]
    wanted = [expect(case, oracle, max_canvas=32) for case in cases]
    assert_equal(cases, run_cases(small_engine, cases), wanted)


# -- what is computed --------------------------------------------------------


def rows_of(engine: Engine, prompt: int, canvas: int, **options) -> list[int]:
    """Rows of every forward of a request alone, one token a step from the left."""
    case = Case(
        make_prompt(prompt),
        rule="static/left_to_right",
        max_tokens=canvas,
        ignore_eos=True,
        **options,
    )
    with counting(engine) as counts:
        (result,) = run_cases(engine, [case])
    assert result.forwards == len(counts.rows)
    return counts.rows


def test_rows_of_vicinity(engine: Engine):
    config = {"look_back": 10, "look_ahead": 3, "warmup_steps": 2}
    rows = rows_of(engine, 21, 24, cache="vicinity", block=8, cache_config=config)
    # Prompt and canvas are 45; in the last block nothing is ahead.
    assert rows == 3 * [45] + 5 * [21] + [45] + 7 * [21] + [45] + 7 * [18]


def test_rows_of_vicinity_reach_into_a_short_prompt(engine: Engine):
    config = {"look_back": 10, "look_ahead": 30, "warmup_steps": 0}
    rows = rows_of(engine, 4, 16, cache="vicinity", block=8, cache_config=config)
    assert rows == 9 * [20] + 7 * [18]


def test_rows_of_window(engine: Engine):
    config = {"active_window": 5, "external_window": 9, "refresh_every": 4}
    rows = rows_of(engine, 10, 20, cache="window", block=20, cache_config=config)
    # A refresh has nine masks, and all to their left; later steps what was written
    # since it and five masks, or those that are left.
    wanted = [19, 6, 7, 8, 23, 6, 7, 8, 27, 6, 7, 8, 30, 6, 7, 8, 30, 4, 4, 4]
    assert rows == wanted


def test_a_window_covers_the_block_of_who_reads_it(engine: Engine):
    config = {"active_window": 2, "external_window": 4}
    case = Case(
        make_prompt(10),
        rule="joint/edit",
        cache="window",
        block=16,
        max_tokens=16,
        ignore_eos=True,
        cache_config=config,
    )
    with counting(engine) as counts:
        (result,) = run_cases(engine, [case])
    assert counts.rows == [26] + [16] * (result.forwards - 1)
    assert result.forwards > 2


# -- preemption --------------------------------------------------------------


def step_by_step(
    engine: Engine, case: Case, preempt_after: int | None = None
) -> tuple[list[int], list[int], list[int]]:
    """Tokens; and of every forward its rows, and the block that was active."""
    engine.add(case.prompt, case.params())
    (request,) = engine.scheduler.requests.values()
    tokens: list[int] = []
    blocks: list[int] = []
    with counting(engine) as counts:
        while engine.busy:
            if len(blocks) == preempt_after:
                engine.preempt(request.request_id)
            blocks.append(request.block_start)
            for output in engine.step():
                tokens = list(output.outputs[0].token_ids)
    return tokens, counts.rows, blocks


@pytest.mark.parametrize(
    ("cache", "every"),
    fast(("window", 4), of=[("window", 4), *((cache, 1) for cache in MOVING_CACHES)]),
)
def test_a_replay_computes_the_same_rows(engine: Engine, cache: str, every: int):
    """After any step of a block, also where its first tokens were handed out."""
    for number, config in list(enumerate(SMALL[cache]))[every > 1 :: every]:
        case = Case(
            make_prompt(9 + number),
            rule=("static/left_to_right", "eb")[number % 2],
            cache=cache,
            block=16,
            max_tokens=32,
            ignore_eos=True,
            cache_config=config,
        )
        tokens, rows, blocks = step_by_step(engine, case)
        assert len(set(blocks)) == 2
        for stop in range(1, len(rows), 9):
            got, got_rows, _ = step_by_step(engine, case, preempt_after=stop)
            assert got == tokens
            # The block that was active begins anew.
            assert got_rows == rows[:stop] + rows[blocks.index(blocks[stop]) :]
