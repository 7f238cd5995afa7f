# SPDX-License-Identifier: Apache-2.0
"""The kit for strategies' authors: ours pass, and what it shows them is an engine's."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference.registered import (
    GIVEN,
    NAMES,
    OF_CAUSAL_MODELS,
    OF_EDITING_MODELS,
    OF_RANDOM_TOKENS,
    build,
)
from tiers import fast

from vllm_dlm.config.aliases import resolve
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import (
    View,
)
from vllm_dlm.strategies.threshold import Threshold
from vllm_dlm.testing import check_strategy
from vllm_dlm.testing.blocks import MASK_ID, RandomBlocks, padded
from vllm_dlm.testing.check import CONTEXT

EAGER = {"credit", "freedave", "klass", "linear_spec", "lopa", "prophet"}
"""They read more of a step than a compiled function has."""


# -- ours ------------------------------------------------------------------


ALL = [*NAMES, *OF_EDITING_MODELS, *OF_CAUSAL_MODELS, *OF_RANDOM_TOKENS]


QUICK = (
    # One of each kind: stateless, with a memory, with edits, of several forwards, ...
    *("static", "threshold", "credit", "hierarchy", "freedave", "replay"),
    *(*OF_EDITING_MODELS, *OF_CAUSAL_MODELS, *OF_RANDOM_TOKENS),
)


@pytest.mark.parametrize("name", fast(*QUICK, of=ALL))
def test_registered_strategies_keep_the_contract(name: str):
    check_strategy(STRATEGIES[name], params=GIVEN.get(name), compiling="no")


@pytest.mark.parametrize("name", fast("saber", "slowfast", "lopa", of=ALL))
def test_registered_strategies_can_be_compiled(name: str):
    """With edits, with a memory, and one that cannot; others in the slow tier."""
    report = check_strategy(
        STRATEGIES[name],
        params=GIVEN.get(name),
        compiling="trace",
        required=name not in EAGER,
    )
    assert report.traces == (name not in EAGER)


@pytest.mark.slow
# With a filter, edits, a memory, and a length that changes.
@pytest.mark.parametrize("name", ["learn2pd", "joint", "slowfast", "levenshtein"])
def test_registered_strategies_decide_alike_compiled(name: str):
    # Of a model with a filter, for learn2pd.
    context = replace(CONTEXT, model=str(resolve("llada-tiny")))
    report = check_strategy(
        STRATEGIES[name],
        params=GIVEN.get(name),
        block_length=32,
        required=True,
        context=context,
    )
    assert report.findings["compiled"] == "decides as eagerly, bit for bit"


def test_a_compiled_strategy_decides_alike():
    report = check_strategy(Threshold, params={"threshold": 0.8}, required=True)
    assert report.traces
    printed = str(report)
    assert printed.startswith("threshold (threshold=0.8), blocks of 8: 24 steps of 12")
    assert "decides as eagerly, bit for bit" in printed


OTHERS: dict[str, dict[str, Any]] = {
    "threshold": {"at_least": "scheduled", "strict": True},
    "static": {"mode": "margin"},
    "eoser": {"schedule": "doubling"},
    "dream": {"alg": "origin"},
    "credit": {"mode": "parameter_free"},
}


@pytest.mark.parametrize(
    ("name", "block_length"),
    fast(
        *zip(OTHERS, (1, 5, 32, 5, 32), strict=True),
        of=itertools.product(OTHERS, (1, 5, 32)),
    ),
)
def test_other_parameters_and_lengths(name: str, block_length: int):
    check_strategy(
        STRATEGIES[name],
        params=OTHERS[name],
        block_length=block_length,
        compiling="no",
        seed=block_length,
    )


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("credit", {"threshold": 0.3}),
        ("joint", {"edit_threshold": 0.0}),
        ("joint", {"edit": False, "penalty": 3.0}),
    ],
)
def test_who_heeds_patterns_writes_candidates_alone(name: str, params: Any):
    context = replace(CONTEXT, has_pattern=True)
    check_strategy(STRATEGIES[name], params=params, compiling="no", context=context)


# -- what it shows a strategy ----------------------------------------------


def views(name: str, steps: int = 40, rows: int = 16) -> list[View]:
    """What a strategy of ours sees."""
    strategy = build(name)
    numbers = {"threshold": torch.full((rows,), 0.75)}
    blocks = RandomBlocks(strategy, [strategy.params] * rows, numbers, seed=1)
    seen = []
    for _ in range(steps):
        seen.append(blocks.view())
        blocks.go_on(seen[-1], strategy.select(seen[-1], numbers))
    return seen


def test_views_are_those_of_an_engine():
    for view in views("threshold"):
        assert not (view.masked & ~view.masks).any()
        assert not (view.decided & view.masks).any()
        assert (view.masked.any(dim=1)).all()
        assert torch.equal(view.tokens == MASK_ID, view.masks)
        assert (view.confidence[~view.masked] == 0).all()
        assert torch.equal(view.candidate[~view.masked], view.tokens[~view.masked])
        assert not (view.is_eos & ~view.valid).any()
        for name, value in vars(view).items():
            if isinstance(value, torch.Tensor):
                assert not value.isnan().any(), name


def test_views_have_what_an_engine_has():
    """Once in forty steps at least, each of the cases that strategies go wrong in."""
    seen = views("threshold")

    def some(flags: Any) -> bool:
        return any(bool(flags(view).any()) for view in seen)

    assert some(lambda v: v.masked & (v.confidence == 0))
    assert some(lambda v: v.masked & (v.confidence == 1))
    assert some(lambda v: v.masked & (v.confidence == 0.75))
    assert some(lambda v: ~v.valid)
    assert some(lambda v: v.valid & (v.positions < 0))
    assert some(lambda v: v.masks & ~v.masked)  # further sub-blocks
    assert some(lambda v: v.decided & (v.step == 0)[:, None])
    assert some(lambda v: v.step > 2)
    assert some(lambda v: v.step != v.step[0])
    best = [view.confidence.topk(2, dim=1).values for view in seen]
    assert any((two[:, 0] == two[:, 1]).any() for two in best)


def test_views_have_the_state_of_the_steps_before():
    for view in views("ass"):
        begins = view.step == 0
        assert (view.state["masks"][begins] == 0).all()
        assert (view.state["masks"][~begins] > 0).all()


def test_padding_is_rows_of_no_request():
    [view, *_] = views("freedave")
    more = padded(view, 3)
    rows = len(view.step)
    assert len(more.step) == rows + 3
    assert not more.masked[rows:].any() and not more.valid[rows:].any()
    assert (more.steps[rows:] == 1).all()
    again = more.take(slice(0, rows), 8)
    assert torch.equal(again.branches.masked, view.branches.masked)
