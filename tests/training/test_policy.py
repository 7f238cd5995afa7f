# SPDX-License-Identifier: Apache-2.0
"""Policy gradients: the numbers of the formulas, and against plain loops."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch")

from training.naive_policy import (  # noqa: E402
    BETA,
    CANVAS,
    EPSILON,
    GROUP,
    MASK,
    REWARDS,
    Toy,
    V,
    make_rollouts,
    naive_cj,
    naive_coupled,
    naive_trace,
)

from vllm_dlm.training.recipes import cj_grpo, coupled_grpo, trace_rl  # noqa: E402
from vllm_dlm.training.reinforcement import policy  # noqa: E402
from vllm_dlm.training.reinforcement.policy import Term  # noqa: E402
from vllm_dlm.training.reinforcement.rollout_rows import RollOuts  # noqa: E402


def make_terms(recipe: str, rollouts: RollOuts, advantage, **options) -> list[Term]:
    if recipe == "cj":
        return cj_grpo.terms(rollouts, advantage, beta=BETA, **options)
    if recipe.startswith("trace"):
        shrink = int(recipe[-1])
        return trace_rl.terms(rollouts, advantage, beta=BETA, shrink=shrink, **options)
    masks = masks_of(rollouts, recipe)
    return coupled_grpo.terms(
        rollouts,
        advantage,
        masks,
        beta=BETA,
        scored=rollouts.to_end(0),
        estimate=recipe,
        **options,
    )


def masks_of(rollouts: RollOuts, recipe: str) -> coupled_grpo.Masks:
    generator = torch.Generator().manual_seed(4)
    share = 0.5 if recipe == "one-step" else 0.0
    return coupled_grpo.draw_masks(rollouts, generator, share)


def naive_loss(recipe: str, new, old, reference, rollouts, advantage):
    networks = (new, old, reference, rollouts, advantage)
    if recipe == "cj":
        return naive_cj(*networks)
    if recipe.startswith("trace"):
        return naive_trace(new, old, old, rollouts, advantage, shrink=int(recipe[-1]))
    masks = masks_of(rollouts, recipe)
    return naive_coupled(*networks, masks, one_step=recipe == "one-step")


def referring(network):
    @contextmanager
    def reference():
        yield network.logits_at

    return reference


RECIPES = ["cj", "trace-1", "trace-2", "coupled", "one-step"]


@pytest.mark.parametrize("rows_at_once", [None, 1, 3])
@pytest.mark.parametrize("recipe", RECIPES)
def test_against_a_naive_implementation(recipe: str, rows_at_once: int | None):
    """Loss and gradient at a later inner update, where ratios are not 1: terms one
    after the other are the one sum, in parts of any size."""
    rollouts = make_rollouts()
    advantage = policy.advantages(REWARDS, GROUP, "mean")
    new, old, reference = Toy(1), Toy(1), Toy(2)
    with torch.no_grad():
        for parameter in old.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    terms = make_terms(recipe, rollouts, advantage, rows_at_once=rows_at_once)
    policy.refer(terms, old.logits_at, referring(reference), first=False)
    loss = policy.backward(terms, new.logits_at, EPSILON)
    found = [parameter.grad.clone() for parameter in new.parameters()]
    new.zero_grad()
    wanted = naive_loss(recipe, new, old, reference, rollouts, advantage)
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-5, abs=1e-6)
    for mine, parameter in zip(found, new.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=1e-5, rtol=1e-4)
    ratios = torch.cat([(t.log_probabilities(new.logits_at) - t.old) for t in terms])
    assert ratios.abs().max() > math.log(1 + EPSILON)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_first_inner_update(recipe: str):
    """All ratios are 1 to the bit, and the gradient that of -A log p."""
    rollouts = make_rollouts()
    advantage = policy.advantages(REWARDS, GROUP, "leave-one-out")
    toy = Toy(1)
    terms = make_terms(recipe, rollouts, advantage)
    policy.refer(terms, toy.logits_at, None, first=True)
    loss = policy.backward(terms, toy.logits_at, EPSILON)
    found = [parameter.grad.clone() for parameter in toy.parameters()]
    weighted = [(term.weights * term.advantages).sum() for term in terms]
    assert loss == pytest.approx(-float(sum(weighted)), abs=1e-6)
    toy.zero_grad()
    total = 0
    for term in terms:
        new = term.log_probabilities(toy.logits_at)
        assert ((new - term.old).exp() == 1).all()
        total = total - (term.weights * term.advantages * new).sum()
    total.backward()
    for mine, parameter in zip(found, toy.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_that_are_left_out(recipe: str):
    """Whether a group with equal rewards is scored or not: its advantage is 0."""
    rollouts = make_rollouts()
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0])
    advantage = policy.advantages(rewards, GROUP, "mean")
    kept = ~policy.equal_groups(rewards, GROUP).repeat_interleave(GROUP)
    assert kept.tolist() == [False, False, True, True]
    gradients = []
    for rows in (None, kept):
        toy = Toy(1)
        terms = make_terms(recipe, rollouts, advantage, kept=rows)
        policy.backward(terms, toy.logits_at, EPSILON)
        gradients.append(torch.cat([p.grad.flatten() for p in toy.parameters()]))
    torch.testing.assert_close(*gradients)
    assert sum(len(term.weights) for term in terms) < 12


@pytest.mark.parametrize("recipe", ["cj", "coupled"])
def test_another_row_beside_changes_nothing(recipe: str):
    """A row is scored alike beside a longer one and alone: padding is not seen."""
    rollouts = make_rollouts()
    toy = Toy(1)
    advantage = policy.advantages(REWARDS, GROUP, "mean")
    alone = torch.arange(4) == 0
    for kept in (alone, alone.roll(2)):
        terms = make_terms(recipe, rollouts, advantage, kept=kept)
        together = make_terms(recipe, rollouts, advantage, rows_at_once=4)
        new = torch.cat([t.log_probabilities(toy.logits_at) for t in terms])
        of_all = torch.cat([t.log_probabilities(toy.logits_at) for t in together])
        for value in new:
            assert (of_all - value).abs().min() < 1e-6


def test_cj_counts_every_token_once():
    rollouts = make_rollouts()
    advantage = policy.advantages(REWARDS, GROUP, "mean")
    terms = make_terms("cj", rollouts, advantage)
    assert sum(len(term.weights) for term in terms) == 4 * CANVAS
    # Each step weighs the same, whether it wrote 6 tokens, 5 or 1.
    assert [len(term.weights) for term in terms] == [6, 5, 1]
    assert [float(t.weights.sum()) for t in terms] == pytest.approx([1 / 3] * 3)
    cut = make_terms("cj", rollouts, advantage, scored=rollouts.to_end(0))
    assert sum(len(t.weights) for t in cut) == int(rollouts.to_end(0).sum()) == 9
    assert float(sum(t.weights.sum() for t in cut)) == pytest.approx(1)


def test_canvases():
    rollouts = make_rollouts()
    assert rollouts.num_steps == 3
    assert rollouts.canvas(0)[1].tolist() == [1, 1, MASK, MASK, MASK]
    assert rollouts.canvas(1)[1].tolist() == [1, 1, MASK, 2, 2]
    assert rollouts.canvas(2)[2].tolist() == [1, MASK, 0, 2, 1]
    assert rollouts.answers(0) == [[2], [1, 2, 2], [], [1, 1]]
    never = RollOuts(**{**vars(rollouts), "steps": rollouts.steps - 1})
    # What no step has written is masked on every canvas.
    assert never.canvas(1)[0].tolist() == [1, MASK, MASK, 1, 1]


# -- numbers ------------------------------------------------------------------


def test_advantages():
    rewards = torch.tensor([1.0, 0, 0, 1])
    expect = {
        "mean": [0.5, -0.5, -0.5, 0.5],
        "leave-one-out": [0.6667, -0.6667, -0.6667, 0.6667],
        "z-score": [1.0, -1.0, -1.0, 1.0],
    }
    for baseline, wanted in expect.items():
        found = policy.advantages(rewards, 4, baseline)
        assert found.tolist() == pytest.approx(wanted, abs=1e-4)
        equal = policy.advantages(torch.full((4,), 0.3), 4, baseline)
        assert equal.tolist() == pytest.approx([0] * 4, abs=1e-6)
    assert policy.equal_groups(torch.tensor([1.0, 1, 0, 1]), 2).tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("difference", "advantage", "loss"),
    [(0.7, 0.5, -0.75), (0.7, -0.5, 1.0069), (-0.9, 0.5, -0.2033), (-0.9, -0.5, 0.25)],
)
def test_clipped_losses(difference: float, advantage: float, loss: float):
    found = policy.clipped_losses(
        torch.tensor([difference]), torch.zeros(1), torch.tensor([advantage]), 0.5
    )
    assert found.item() == pytest.approx(loss, abs=1e-4)


def test_divergence():
    found = policy.divergences(torch.zeros(1), torch.tensor([0.2]))
    assert found.item() == pytest.approx(0.0214, abs=1e-4)


def test_coupled_numbers():
    """l(all) = -2; l(D) = -1 with r = .4 gives -2.25; -.5 in the rest, -1.41667."""
    rollouts = make_rollouts().take(torch.tensor([0]))
    first = torch.tensor([[False, True, False, False, False]])
    masks = coupled_grpo.Masks(0.4, first, torch.zeros_like(first))

    def logits_at(ids, valid, where):
        hidden = int((ids == MASK).sum())
        value = {3: -2.0, 1: -1.0, 2: -0.5}[hidden]
        # The written token has this log-probability, another one the rest.
        tokens = rollouts.ids[where]
        logits = torch.full((len(tokens), V), -torch.inf)
        logits[torch.arange(len(tokens)), tokens] = value
        rest = (tokens + 1) % 3
        logits[torch.arange(len(tokens)), rest] = math.log(1 - math.exp(value))
        return logits

    scored = rollouts.to_end(0)
    found = coupled_grpo.coupled_estimate(logits_at, rollouts, scored, masks)
    assert found.tolist() == pytest.approx([-2.25, -1.41667], abs=1e-4)


def test_coupled_masks():
    rollouts = make_rollouts()

    def draw(seed: int) -> coupled_grpo.Masks:
        generator = torch.Generator().manual_seed(seed)
        return coupled_grpo.draw_masks(rollouts, generator, 0.15)

    shares = []
    for seed in range(200):
        masks = draw(seed)
        shares.append(masks.share)
        assert not (masks.first & ~rollouts.response).any()
        assert not (masks.prompt & (rollouts.response | ~rollouts.valid)).any()
    assert 0.2 <= min(shares) < 0.25 and 0.75 < max(shares) <= 0.8
    again, toy = draw(7), Toy(1)
    estimates = [
        coupled_grpo.coupled_estimate(
            toy.logits_at, rollouts, rollouts.to_end(0), masks
        )
        for masks in (again, draw(7), draw(8))
    ]
    assert torch.equal(estimates[0], estimates[1])
    assert not torch.equal(estimates[0], estimates[2])
