# SPDX-License-Identifier: Apache-2.0
"""Who follows the step schedule says so, and nobody else reads it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference.registered import NAMES, build, without_drafts
from reference.views import random_view, select, with_probabilities

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import Params, Strategy

WIDTH, VOCAB = 8, 12
FOLLOWING = {
    name: {} for name in ("dream", "diffucoder", "static", "pc", "klass", "prophet")
}
FOLLOWING |= {
    "learn2pd": {},
    "threshold": {"at_least": "scheduled"},
    "eoser": {"schedule": "even"},
}
OTHER_PARAMETERS = {
    "threshold": {"at_least": "best"},
    "eoser": {"schedule": "doubling"},
}


def decides_without_a_schedule(strategy: Strategy) -> bool:
    """Whether a step can be decided from a view that has no schedule."""
    view = without_drafts(random_view(seed=1, rows=3, width=WIDTH))
    logits = torch.randn(3, WIDTH, VOCAB, generator=torch.Generator().manual_seed(1))
    view = with_probabilities(view, logits.softmax(-1))
    view = replace(view, uniform=torch.full((3, WIDTH), 0.5))
    select(strategy, view)
    try:
        select(strategy, replace(view, scheduled=None, steps=None))
    except (TypeError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_who_follows_the_schedule_says_so(name: str):
    for params in (FOLLOWING.get(name, {}), OTHER_PARAMETERS.get(name, {})):
        strategy = build(name, WIDTH, **params)
        follows = type(strategy).follows_schedule(strategy.params)
        assert follows == (name in FOLLOWING and params == FOLLOWING[name])
        assert follows != decides_without_a_schedule(strategy)


def test_by_default_a_strategy_of_yours_follows_none():
    class Mine(Strategy):
        name = "mine"

    class Half(Mine):
        schedule = {"mode": "even"}  # noqa: RUF012

        class Params(Params):
            mode: str = "odd"

    assert not Mine.follows_schedule(Mine.Params())
    assert not Half.follows_schedule(Half.Params())
    assert Half.follows_schedule(Half.Params(mode="even"))


@pytest.mark.parametrize(
    ("name", "params", "steps"),
    [
        *[(name, FOLLOWING[name], 3) for name in FOLLOWING if name != "learn2pd"],
        ("learn2pd", {}, None),  # its loop counts steps, but ends with the last mask
        ("ass", {}, 4),  # 1, 2, 4 and 9 of 16
        ("eoser", {"schedule": "doubling"}, 4),
        ("freedave", {}, 16),  # one token per step
        ("freedave", {"threshold": 0.9}, None),
        *[
            (name, {}, None)
            for name in NAMES
            if name not in (*FOLLOWING, "ass", "freedave")
        ],
    ],
)
def test_steps_after_which_the_published_loop_ends(name, params, steps):
    strategy = build(name, 16, **params)
    assert strategy.reference_steps(strategy.params, 3) == steps


def test_every_strategy_is_here():
    assert set(FOLLOWING) == {n for n in STRATEGIES if STRATEGIES[n].schedule}
