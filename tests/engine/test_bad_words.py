# SPDX-License-Identifier: Apache-2.0
"""No text holds a bad word: whatever the strategy, the model, the prompt's length."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from engine.block_engines import BLOCK, BlockEngines
from engine.cases import follows_schedule, make_prompt
from engine.harness import Engine, Finished, params
from reference.registered import PLAIN
from tiers import fast

from vllm_dlm.model_executor.sampling.bad_words import BadWords
from vllm_dlm.strategies import STRATEGIES

PROMPTS = [make_prompt(3 + 5 * number, number) for number in range(8)]
LENGTH = 16
WORDS = 110
"""Token ids below are words, those above special tokens."""
MOST = 100
"""Bad words of a request."""

BOLD: dict[str, dict[str, Any]] = {
    "ass": {},
    "bacd": {"lowest": 0.02, "highest": 0.1},
    "cad": {"threshold": 0.05},
    "credit": {},
    "diffucoder": {},
    "dmax": {"threshold": 0.02, "soft": False},
    "dream": {},
    "eb": {"bound": 10.0},
    "entropy": {"threshold": 4.0},
    "eoser": {},
    "ete": {"threshold": 0.02},
    "factor": {"factor": 100.0},
    "freedave": {},
    "hierarchy": {"threshold": 0.05, "low_threshold": 0.03, "remask": True},
    "joint": {"mask_threshold": 0.02, "edit_threshold": 0.0},
    "klass": {"threshold": 0.05, "kl_threshold": 10.0},
    "learn2pd": {},
    "localleap": {},
    "lopa": {"threshold": 0.02},
    "multi_block": {"block": 4, "threshold": 4.0, "open_at": 0.25},
    "pc": {},
    "prophet": {"early": 0.1, "middle": 0.1, "late": 0.1},
    "replay": {"recorded_steps": [0] * LENGTH},
    "saber": {},
    "slowfast": {"threshold": 0.05},
    "static": {},
    "threshold": {"threshold": 0.02},
}
"""Parameters with which a random model writes many tokens in one step."""


Pairs = set[tuple[int, int]]


def pairs_of(result: Finished) -> Pairs:
    return set(itertools.pairwise(result.tokens))


def as_text(pairs: Pairs) -> list[str]:
    return [f"t{first} t{second}" for first, second in sorted(pairs)]


def assert_clean(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    rounds: int = 3,
    **options: Any,
) -> None:
    """Ban all pairs of the texts, and those of the texts that come instead, ..."""
    banned: list[Pairs] = [set() for _ in prompts]
    for _ in range(rounds):
        sampling = [
            params(LENGTH, ignore_eos=True, bad_words=as_text(pairs), **options)
            for pairs in banned
        ]
        results = engine.run(prompts, sampling)
        for pairs, result in zip(banned, results, strict=True):
            assert len(result.tokens) == LENGTH
            assert not pairs_of(result) & pairs
            new = sorted(pair for pair in pairs_of(result) if max(pair) < WORDS)
            pairs |= set(new[: MOST - len(pairs)])
    assert sum(map(len, banned)) > 10 * len(prompts)


def test_every_strategy_is_tried():
    assert sorted(BOLD) == sorted([*PLAIN, "dmax"])


@pytest.mark.parametrize("strategy", fast("threshold", of=sorted(BOLD)))
def test_no_strategy_writes_one(engine: Engine, strategy: str):
    dlm = {"strategy": strategy, "strategy_config": BOLD[strategy]}
    if STRATEGIES[strategy].scope == "block":
        dlm["block_length"] = 8
    assert_clean(engine, PROMPTS, dlm=dlm)
    if follows_schedule(strategy, BOLD[strategy]):
        dlm["steps"] = LENGTH // 3  # several tokens a step
    assert_clean(engine, PROMPTS, dlm=dlm, temperature=0.8, seed=1)


FAMILIES = ("SDAR-4B-Chat-b16", "Fast_dLLM_v2_7B", "Qwen3-0.6B-diffusion-bd3lm-v0.1")


@pytest.mark.parametrize(
    ("name", "exact"),
    fast(
        *zip(FAMILIES[1:], (True, False), strict=True),
        of=itertools.product(FAMILIES, (False, True)),
    ),
)
def test_prompts_that_end_anywhere_in_a_block(
    engines: Callable[..., Engine], tmp_path_factory, name: str, exact: bool
):
    """Blocks that begin in the prompt, in the text, and with a seed of their own."""
    engine = BlockEngines(engines, tmp_path_factory.getbasetemp(), name)()
    prompts = [make_prompt(length, length) for length in range(1, BLOCK + 1)]
    strategy = {"strategy": "threshold", "strategy_config": BOLD["threshold"]}
    assert_clean(engine, prompts, dlm=strategy | {"reference_exact": exact})


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_text_ends_where_every_token_would_complete_one(
    engine: Engine, temperature: float
):
    """`allowed_token_ids` counts; elsewhere the bad words do."""
    dlm = {"strategy": "factor", "strategy_config": BOLD["factor"], "block_length": 8}
    options = {"dlm": dlm, "ignore_eos": True, "temperature": temperature, "seed": 1}
    sampling = [
        params(LENGTH, allowed_token_ids=[5], bad_words=["t5"], **options),
        params(LENGTH, allowed_token_ids=[5], bad_words=["t5 t5"], **options),
        params(LENGTH, allowed_token_ids=[5, 6], bad_words=["t5 t5"], **options),
        params(LENGTH, allowed_token_ids=[5, 6], bad_words=["t6"], **options),
    ]
    one, pair, free, other = engine.run(PROMPTS[:4], sampling)
    assert one.tokens == pair.tokens == other.tokens == [5] * LENGTH
    assert len(free.tokens) == LENGTH
    assert set(free.tokens) == {5, 6}
    assert (5, 5) not in pairs_of(free)


def test_a_step_looks_at_its_block_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    """However long the text is, and only for requests that have bad words."""
    seen: list[int] = []
    for name in ("banned", "vetoed"):
        method = getattr(BadWords, name)

        def spy(words, tokens, *args, method=method, **options):
            seen.append(len(tokens))
            return method(words, tokens, *args, **options)

        monkeypatch.setattr(BadWords, name, spy)
    options = {"dlm": {"block_length": 8}, "ignore_eos": True}
    engine.run(PROMPTS, params(LENGTH, min_tokens=3, **options))
    assert seen == []
    engine.run(PROMPTS, params(120, bad_words=["t1 t2 t3"], **options))
    assert max(seen) == 8 + 2
