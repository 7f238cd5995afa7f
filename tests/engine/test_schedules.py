# SPDX-License-Identifier: Apache-2.0
"""A schedule ends only what follows one, and masks are text where published loops
leave them: every strategy and class of models, steps set or not, exact or not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.case_rules import EVENTFUL, case_rule
from engine.cases import (
    RULES,
    Case,
    Expected,
    expect,
    is_near_tie,
    make_prompt,
    run_cases,
)
from engine.harness import Engine, params
from reference import place_rules, rules, stateful_rules
from reference.block_procedures import generate_blocks
from reference.checkpoints import write_checkpoint
from reference.llada import TinyLLaDA
from reference.network import TinyModel
from reference.registered import PLAIN
from reference.rules import Rule, View
from reference.stateful_rules import remembering
from tiers import fast
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_dlm.strategies import STRATEGIES

BLOCK = 16
STEPS = 4
"""Of a block: Learn2PD's oracle divides evenly."""


@pytest.fixture(scope="module")
def hurried(engines: Callable[..., Engine]) -> Engine:
    """LLaDA on a server with `steps`, for whom it may concern."""
    return engines({"steps": STEPS})


def cases(steps: int | None, times: int) -> list[Case]:
    """Each rule, one block: LLaDA's loop goes back to masks that a block has left."""
    return [
        Case(
            make_prompt(1 + 3 * number % 40, number),
            rule=rule,
            block=BLOCK,
            max_tokens=BLOCK,
            steps=steps,
            ignore_eos=True,
            seed=number,
        )
        for first, rule in enumerate(RULES)
        for number in range(first, first + 50 * times, 50)
    ]


def published(case: Case, oracle: TinyLLaDA) -> Expected | None:
    """What the published loop makes of a request; None where it would never end."""
    try:
        return expect(case, oracle, forbid_mask=False)
    except RuntimeError:
        return None


QUICK = ("the server's", True, 1)
ASKED = [
    *itertools.product(("none", "the request's", "the server's"), (False, True), (2,))
]


@pytest.mark.parametrize(("steps", "exact", "times"), fast(QUICK, of=[QUICK, *ASKED]))
def test_full_attention(
    engine: Engine,
    hurried: Engine,
    oracle: TinyLLaDA,
    steps: str,
    exact: bool,
    times: int,
):
    """
    Args:
        times: how many prompts each rule has.
    """
    asked = cases(STEPS if steps == "the request's" else None, times)
    served = hurried if steps == "the server's" else engine
    got = run_cases(served, asked, reference_exact=exact)
    if steps == "the server's":
        asked = cases(STEPS, times)
    masks, ended = 0, 0
    for case, result in zip(asked, got, strict=True):
        has_masks = oracle.mask_id in result.tokens
        rule = case_rule(case, 0, BLOCK, oracle.eos_id)
        assert not has_masks or (exact and rule.ends_by_schedule), case
        wanted = published(case, oracle) if exact else expect(case, oracle)
        # Of blocks that the engine has to end, only that they have no mask is known.
        if wanted and (not rule.rewrites or wanted.forwards < 2 * BLOCK):
            assert result.tokens == wanted.tokens or wanted.near_tie, case
            masks += has_masks
            ended += not has_masks
    assert ended >= 10 * times
    assert masks >= times if exact else masks == 0


# -- models that write block after block --------------------------------------------

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "SDAR-4B-Chat-b8": ("sdar", {"seed": 1}),
    "Fast_dLLM_v2_7B": ("fast_dllm_v2", {"seed": 2, "bd_size": 16}),
    "Nemotron-Labs-Diffusion-3B": ("nemotron", {"seed": 2}),
}
"""Names and weights of checkpoints; these weights choose the mask id now and then."""

EQUAL_FREQUENCIES = torch.full((1,), math.exp(-1))

BLOCK_RULES: dict[str, tuple[dict[str, Any], Callable[[], Rule]]] = {
    "static": ({}, rules.static),
    "dream": ({"alg": "maskgit_plus"}, lambda: rules.dream("maskgit_plus")),
    "diffucoder": ({"alg": "topk_margin"}, lambda: rules.dream("topk_margin")),
    "threshold": (
        {"threshold": 0.6, "strict": True, "at_least": "scheduled"},
        lambda: rules.threshold(0.6, strict=True, at_least="scheduled"),
    ),
    "klass": (
        EVENTFUL["klass"],
        lambda: remembering(
            partial(stateful_rules.Klass, **EVENTFUL["klass"])
        )._replace(ends_by_schedule=True),
    ),
    "pc": ({}, lambda: place_rules.pc(EQUAL_FREQUENCIES)),
}
"""Strategies whose published loops leave masks: parameters, and the oracle's rule."""

OTHER_CONFIGS: dict[str, dict[str, Any]] = {
    "threshold best": {"threshold": 0.6, "at_least": "best"},
    "joint": EVENTFUL["joint"],
    "bacd": EVENTFUL["bacd"],
    "credit": EVENTFUL["credit"],
    "slowfast": EVENTFUL["slowfast"],
    "hierarchy": {"remask": True},
    "replay": {"recorded_steps": [3, 1, 4, 1, 5, 9, 2, 6, 5]},
    "freedave": {"threshold": 0.5},
}


def others() -> list[str]:
    """Those that write until no mask is left."""
    return [
        name
        for name in [*PLAIN, "threshold best"]
        if name not in BLOCK_RULES and STRATEGIES[name.split()[0]].scope == "block"
    ]


@pytest.fixture(scope="module", params=fast("Fast_dLLM_v2_7B", of=FAMILIES))
def family(
    engines: Callable[..., Engine], tmp_path_factory: Any, request: Any
) -> tuple[Engine, TinyModel]:
    name, changes = FAMILIES[request.param]
    folder: Path = tmp_path_factory.mktemp("model") / request.param
    write_checkpoint(name, folder, **changes)
    return engines(model=str(folder)), TinyModel.from_folder(folder)


def ask(
    name: str, config: dict[str, Any], steps: int | None, number: int, **more: Any
) -> SamplingParams:
    dlm = {
        "strategy": name.split()[0],
        "strategy_config": config,
        "reference_exact": True,
        "steps_per_block": steps,
    }
    return params(9 + 7 * number % 20, dlm=dlm | more, ignore_eos=True, seed=number)


@pytest.mark.parametrize(
    ("steps", "times"), fast((3, 2), of=((3, 2), (None, 4), (3, 4)))
)
def test_block_after_block(
    family: tuple[Engine, TinyModel], steps: int | None, times: int
):
    """Whole texts of who follows a schedule; no mask in any other."""
    engine, oracle = family
    defaults = engine.scheduler.dlm_defaults
    prompts, sampling, wanted = [], [], []
    for number, name in enumerate([*BLOCK_RULES] * times):
        config, make_rule = BLOCK_RULES[name]
        prompts.append(make_prompt(1 + 5 * number % 40, number))
        sampling.append(ask(name, config, steps, number))
        ties: list[bool] = []
        rule = make_rule()

        def observe(
            view: View, chosen: list[int], rule: Rule = rule, ties: list[bool] = ties
        ) -> None:
            ties.append(is_near_tie(rule, view, chosen))

        result = generate_blocks(
            oracle,
            list(prompts[-1]),
            max_tokens=sampling[-1].max_tokens,
            block_length=defaults.block_length,
            rule=rule,
            steps_per_block=steps,
            origin=defaults.block_origin,
            context="causal" if defaults.attention == "causal" else "blocks",
            shift=defaults.shift,
            seeds=defaults.leads_blocks,
            sub_block_length=defaults.sub_block_length,
            schedule=defaults.schedule,
            forbid_mask=False,
            eos_stop=False,
            observe=observe,
        )
        wanted.append(None if any(ties) else result.tokens)
    exact_ones = len(prompts)
    for number, name in enumerate(others() * (times // 2)):
        prompts.append(make_prompt(1 + 5 * number % 40, number))
        sampling.append(ask(name, OTHER_CONFIGS.get(name, {}), None, number))
    got = [result.tokens for result in engine.run(prompts, sampling)]
    for tokens, expected, asked in zip(got, wanted, sampling, strict=False):
        assert expected in (None, tokens), asked.extra_args
    assert sum(oracle.mask_id in tokens for tokens in got[:exact_ones]) >= times // 2
    for tokens, asked in zip(got[exact_ones:], sampling[exact_ones:], strict=True):
        assert oracle.mask_id not in tokens, asked.extra_args


def test_steps_without_a_schedule_are_refused(family: tuple[Engine, TinyModel]):
    engine, _ = family
    for name in others():
        if STRATEGIES[name.split()[0]].schedule is True:
            continue
        with pytest.raises(VLLMValidationError, match="steps_per_block would be ig"):
            engine.run(
                [make_prompt(3)], ask(name, OTHER_CONFIGS.get(name, {}), 3, number=0)
            )
