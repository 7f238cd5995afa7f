# SPDX-License-Identifier: Apache-2.0
"""Renoise: the worked step of its page, and whole canvases beside plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from constraints.path_cases import automaton, problem_of
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reference.views import CPU, first_state, make_view

from vllm_dlm.constraints.paths import OPEN, solve
from vllm_dlm.kernels.mixtures import mixtures
from vllm_dlm.strategies.base import Decision, SoftInputs, View, numeric_fields
from vllm_dlm.strategies.renoise import Renoise, RenoiseParams

LOGITS = [[6, 1, 0, 0], [2, 1.9, 0, 0], [0, 5, 1, 0], [3, 0, 0, 2]]
"""Of the page's step, before the cap."""
EMBEDDINGS = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]


def renoise(width: int, **params: float) -> Renoise:
    return Renoise(RenoiseParams(**params), width, CPU)


def row_params(strategy: Renoise, rows: int = 1) -> dict[str, torch.Tensor]:
    return {
        name: torch.full((rows,), getattr(strategy.params, name))
        for name in numeric_fields(RenoiseParams)
    }


def canvas_view(
    strategy: Renoise,
    entropy: torch.Tensor,
    best: torch.Tensor,
    state: dict[str, torch.Tensor] | None = None,
    step: int = 0,
    masked: torch.Tensor | None = None,
) -> View:
    """A view of canvases [R, B]; drawn is 100 + position, noise 200 + position."""
    rows, width = entropy.shape
    places = torch.arange(width).repeat(rows, 1)
    masked = torch.ones_like(entropy, dtype=torch.bool) if masked is None else masked
    return make_view(
        torch.rand(rows, width),
        masked,
        candidate=100 + places,
        entropy=entropy,
        best=best,
        noise=200 + places,
        step=torch.full((rows,), step),
        state=first_state(strategy, rows) if state is None else state,
    )


def test_the_worked_step():
    strategy = renoise(4, max_denoising_steps=4, entropy_bound=0.1)
    params = row_params(strategy)
    (temperature,) = strategy.temperature(torch.tensor([1]), params).tolist()
    assert temperature == pytest.approx(0.7)
    logits = 30 * torch.tanh(torch.tensor(LOGITS) / 30)
    assert logits[0].tolist() == pytest.approx([5.9213, 0.9996, 0, 0], abs=1e-4)
    probabilities = (logits / temperature).softmax(dim=1)
    entropy = torch.special.entr(probabilities).sum(dim=1)
    assert entropy.tolist() == pytest.approx([0.0111, 0.9127, 0.0369, 0.6033], abs=1e-4)

    best = logits.argmax(dim=1)
    assert best.tolist() == [0, 0, 1, 0]
    view = canvas_view(strategy, entropy[None], best[None], step=1)
    decision = strategy.select(view, params)
    # Only what lies before it counts: 3 is accepted, with .6033 of its own.
    assert decision.held.tolist() == [[100, 201, 102, 103]]
    assert not decision.commit.any() and decision.idle.all()
    assert entropy.mean().item() == pytest.approx(0.3910, abs=1e-4)
    assert decision.soft.where.all()

    class Head:
        def mixed(self, probabilities: torch.Tensor) -> torch.Tensor:
            return probabilities @ torch.tensor(EMBEDDINGS) * math.sqrt(2)

    mixed = mixtures(logits / temperature, Head())
    assert mixed[0].tolist() == pytest.approx([1.4121, 0.0009], abs=1e-4)
    assert mixed[1].tolist() == pytest.approx([0.6721, 0.5775], abs=1e-4)


def test_the_temperature_falls():
    strategy = renoise(4)
    steps = torch.tensor([0, 47])
    found = strategy.temperature(steps, row_params(strategy, 2)).tolist()
    assert found == pytest.approx([0.8, 0.40833], abs=1e-5)


def run(
    strategy: Renoise, bests: torch.Tensor, entropies: torch.Tensor
) -> list[Decision]:
    """The decisions of steps [S, B] of one canvas."""
    state, decisions = first_state(strategy, 1), []
    for step, (best, entropy) in enumerate(zip(bests, entropies, strict=True)):
        view = canvas_view(strategy, entropy[None], best[None], state, step)
        decisions.append(strategy.select(view, row_params(strategy)))
        state = dict(decisions[-1].state)
    return decisions


@given(
    seed=st.integers(0, 10_000),
    stability=st.sampled_from([0, 1, 3]),
    width=st.integers(1, 5),
)
def test_a_canvas_stops_as_a_history_of_its_best_tokens_says(seed, stability, width):
    generator = torch.Generator().manual_seed(seed)
    bests = torch.randint(0, 2, (12, width), generator=generator)
    # Ties among them.
    entropies = torch.randint(0, 4, (12, width), generator=generator) / 4
    strategy = renoise(
        width, max_denoising_steps=12, stability=stability, confidence=0.4
    )
    history: list[list[int]] = []
    since = [0] * width
    for step, decision in enumerate(run(strategy, bests, entropies)):
        best, entropy = bests[step].tolist(), entropies[step].tolist()
        before = history[-stability:] if stability else []
        stable = len(before) == stability and all(old == best for old in before)
        stops = stable and sum(entropy) / width < 0.4 or step == 11
        assert decision.commit[0].tolist() == [stops] * width
        assert decision.new_tokens[0].tolist() == best
        since = [
            since[i] if history and history[-1][i] == best[i] else step
            for i in range(width)
        ]
        assert decision.settled[0].tolist() == since
        # Accepted: what smaller entropies, and equal ones to the left, sum to.
        for i in range(width):
            smaller = sum(
                entropy[j] for j in range(width) if (entropy[j], j) < (entropy[i], i)
            )
            accepted = smaller <= 0.1
            assert decision.held[0, i] == (100 if accepted else 200) + i
        history.append(best)


def test_only_positions_of_the_canvas_count():
    strategy = renoise(4, confidence=0.2, stability=1)
    masked = torch.tensor([[True, True, False, False]])
    entropy = torch.tensor([[0.1, 0.2, 9.0, 0.0]])
    best = torch.tensor([[1, 2, 3, 4]])
    view = canvas_view(strategy, entropy, best, masked=masked)
    first = strategy.select(view, row_params(strategy))
    again = replace(
        view,
        best=torch.tensor([[1, 2, 5, 6]]),
        state=dict(first.state),
        step=torch.tensor([1]),
    )
    assert strategy.select(again, row_params(strategy)).commit.equal(masked)


def test_the_worked_pattern():
    """Of its page: what the pattern `ab|cd` leaves of two positions."""
    machine = automaton(
        # A class for each of a, b, c, d, and one for the end.
        [0, 1, 2, 3, 4],
        [[1, -1, 2, -1, -1], [-1, 3, -1, -1, -1], [-1, -1, -1, 3, -1]]
        + [[-1, -1, -1, -1, 4]] * 2,
        [False, False, False, True, True],
    )
    chances = np.array([[0.6, 0.05, 0.3, 0.05, 0], [0.05, 0.2, 0.05, 0.7, 0]])
    with np.errstate(divide="ignore"):
        logits = np.log(chances)
    found = solve(problem_of(logits, machine, [OPEN] * 2, machine.accepting))
    assert found.best.tolist() == found.tokens.tolist() == [2, 3]
    assert found.classes[0, [0, 2]] == pytest.approx([0.3636, 0.6364], abs=1e-4)
    assert found.classes[1, [1, 3]] == pytest.approx([0.3636, 0.6364], abs=1e-4)
    assert found.entropy == pytest.approx([0.6555, 0.6555], abs=1e-4)


def test_what_it_declares():
    assert Renoise.soft(RenoiseParams()) == SoftInputs("full", "condition")
    assert Renoise.why_unconstrained(RenoiseParams()) is None
    assert renoise(256).step_limit(RenoiseParams(max_denoising_steps=7)) == 7
    with pytest.raises(ValidationError, match="t_min 0.9 is above t_max 0.8"):
        RenoiseParams(t_min=0.9)
