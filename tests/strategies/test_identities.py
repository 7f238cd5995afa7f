# SPDX-License-Identifier: Apache-2.0
"""What relates the strategies to each other, and what holds for every one of them.

Where two rules are one at some parameters, they must decide alike in every step of a
block. Identities that a strategy's own test holds are not repeated here.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.registered import NAMES, build, without_drafts
from reference.views import (
    chosen,
    first_state,
    random_view,
    row_params,
    with_probabilities,
)
from reference.walks import random_block
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_dlm.strategies.base import Decision, Strategy, View


def decode(
    strategy: Strategy, view: View, probabilities: torch.Tensor
) -> Iterator[tuple[View, Decision]]:
    """A block's steps, one for each of the distributions [steps, R, B, V]."""
    params = row_params(strategy, len(view.step))
    view = replace(view, state=first_state(strategy, len(view.step)))
    for step, distributions in enumerate(probabilities):
        view = without_drafts(with_probabilities(view, distributions))
        view = replace(view, step=torch.full_like(view.step, step))
        decision = strategy.select(view, params)
        yield view, decision
        nothing = torch.zeros_like(view.masked)
        edit = nothing if decision.edit is None else decision.edit
        remask = nothing if decision.remask is None else decision.remask
        write = decision.commit | edit
        masked = (view.masked & ~decision.commit) | remask
        view = replace(
            view,
            tokens=torch.where(write, written(view, decision), view.tokens),
            masked=masked,
            decided=view.valid & ~masked,
            state={**view.state, **(decision.state or {})},
        )


def written(view: View, decision: Decision) -> torch.Tensor:
    """[R, B] int64: what a step would write at each position."""
    return view.candidate if decision.new_tokens is None else decision.new_tokens


def assert_alike(one: Strategy, other: Strategy, seed: int, scheduled: int = 1) -> None:
    """Two strategies write the same, in each step of a random block."""
    view, probabilities = random_block(seed)
    view.scheduled.fill_(scheduled)
    pairs = zip(
        decode(one, view, probabilities),
        decode(other, view, probabilities),
        strict=True,
    )
    for (my_view, mine), (their_view, theirs) in pairs:
        assert torch.equal(mine.commit, theirs.commit)
        tokens, other_tokens = written(my_view, mine), written(their_view, theirs)
        assert torch.equal(tokens[mine.commit], other_tokens[mine.commit])


# -- one rule is another at some parameters --------------------------------


def one_by_one(width: int = 6) -> list[Strategy]:
    """Rules whose parameters leave nothing but the most confident token."""
    return [
        build("threshold", width, threshold=1.5),
        build("localleap", width, threshold=1.5),
        build("hierarchy", width, threshold=1.5, low_threshold=1.5),
        build("cad", width, most=1),
        build("factor", width, factor=1e-9),
        build("bacd", width, lowest=1.5, highest=1.5),
        build("klass", width, threshold=1.5),
        build("credit", width, threshold=1.5, weight=0.0),
    ]


@pytest.mark.parametrize("strategy", one_by_one(), ids=lambda one: one.name)
@given(seed=st.integers(0, 2**20))
def test_at_their_slowest_rules_are_static(strategy, seed):
    assert_alike(strategy, build("static", 6), seed)


@given(seed=st.integers(0, 2**20), scheduled=st.integers(1, 6))
def test_a_threshold_that_none_reaches_is_the_schedule(seed, scheduled):
    strategy = build("threshold", 6, threshold=1.5, at_least="scheduled")
    assert_alike(strategy, build("static", 6), seed, scheduled)


@given(seed=st.integers(0, 2**20))
def test_without_a_budget_entropies_go_one_by_one(seed):
    # The entropies of a random block are positive and distinct.
    slowest = build("static", 6, mode="entropy")
    assert_alike(build("eb", 6, bound=0.0), slowest, seed)
    assert_alike(build("entropy", 6, threshold=0.0), slowest, seed)
    assert_alike(build("cad", 6, mode="entropy", most=1), slowest, seed)


@given(seed=st.integers(0, 2**20))
def test_a_budget_for_all_writes_all(seed):
    view = random_view(seed)
    everything = [row.nonzero()[:, 0].tolist() for row in view.masked]
    for strategy in (
        build("threshold", threshold=1e-6),
        build("factor", factor=1e6),
        build("entropy", threshold=100.0),
        build("eb", bound=1e6),
        build("cad", fewest=8, most=8),
        build("localleap", threshold=1e-6),
        build("hierarchy", threshold=1e-6, low_threshold=0.0),
    ):
        assert chosen(strategy, view) == everything


# -- what holds for every strategy ------------------------------------------


@pytest.mark.slow  # By default testing/ tries it, on views of its own.
@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**20))
def test_a_batch_decides_as_its_rows_alone(name, seed):
    strategy = build(name, 6)
    view, probabilities = random_block(seed)
    together = [decision for _, decision in decode(strategy, view, probabilities)]
    for row in range(len(view.step)):
        one, its_own = view.take(np.array([row]), 6), probabilities[:, row, None]
        for step, (_, alone) in enumerate(decode(strategy, one, its_own)):
            whole = together[step]
            for field in ("commit", "edit", "remask", "hold", "truncate_at", "idle"):
                mine, ours = getattr(alone, field), getattr(whole, field)
                assert mine is None or torch.equal(mine[0], ours[row])


@pytest.mark.slow  # By default testing/ tries it, on views of its own.
@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**20))
def test_decisions_are_of_the_contracts_shapes(name, seed):
    strategy = build(name, 6)
    view, probabilities = random_block(seed)
    rows, width = view.masked.shape
    for _, decision in decode(strategy, view, probabilities):
        for grid in (decision.commit, decision.edit, decision.remask):
            assert grid is None or grid.shape == (rows, width)
            assert grid is None or grid.dtype == torch.bool
        for flags in (decision.hold, decision.idle):
            assert flags is None or flags.shape == (rows,)
            assert flags is None or flags.dtype == torch.bool
        state = decision.state or {}
        assert set(state) <= set(strategy.state)
        for key, value in state.items():
            assert value.shape == (rows, *strategy.state[key].shape)


def as_read(view: View, noise: torch.Generator | None) -> View:
    """The view without statistics of decided positions: noise in their place, or 0."""

    def only_masked(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None:
            return None
        elsewhere = torch.zeros_like(values)
        if noise is not None:
            elsewhere.uniform_(generator=noise)
        return torch.where(view.masked, values, elsewhere)

    probabilities = view.probabilities
    if probabilities is not None:
        rows = np.where(view.masked.numpy(), probabilities.rows, -1)
        probabilities = replace(probabilities, rows=rows)
    return replace(
        view,
        candidate=torch.where(view.masked, view.candidate, view.tokens),
        confidence=only_masked(view.confidence),
        entropy=only_masked(view.entropy),
        margin=only_masked(view.margin),
        probabilities=probabilities,
    )


READ_MASKS = [name for name in NAMES if build(name, 6).logit_rows == "masked"]


@pytest.mark.parametrize("name", READ_MASKS)
@given(seed=st.integers(0, 2**20))
def test_what_is_declared_unread_is_not_read(name, seed):
    """`logit_rows = "masked"`: the engine computes no logits of decided positions."""
    strategy = build(name, 6)
    view, probabilities = random_block(seed)
    params = row_params(strategy, len(view.step))
    noise = torch.Generator().manual_seed(seed)
    for seen, decision in decode(strategy, view, probabilities):
        noisy = strategy.select(as_read(seen, noise), params)
        assert torch.equal(noisy.commit & seen.masked, decision.commit & seen.masked)
        write = decision.commit & seen.masked
        assert torch.equal(written(seen, noisy)[write], written(seen, decision)[write])
        for field in ("hold", "truncate_at", "idle"):
            mine, theirs = getattr(noisy, field), getattr(decision, field)
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_deciding_does_not_wait_for_the_device(name):
    """Fake tensors hold no numbers: `.item()` and `if tensor` fail on them."""
    strategy = build(name, 6)
    for view, _ in decode(strategy, *random_block(0)):
        with FakeTensorMode(allow_non_fake_inputs=True):
            strategy.select(view, row_params(strategy, len(view.step)))
