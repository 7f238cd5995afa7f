# SPDX-License-Identifier: Apache-2.0
"""The formula: the worked example, the gradient, and where probabilities are 0."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from steering.reference import steered_logits

from vllm_dlm.steering.rule import PRUNED, best_mu, direction, is_kept, steer

TUNED = torch.tensor([0.7, 0.2, 0.1]).log()
BASE = torch.tensor([0.5, 0.3, 0.2]).log()


def test_the_worked_example():
    delta = torch.tensor([-0.17594, 0.09812, 0.07783])
    torch.testing.assert_close(direction(TUNED, BASE), delta, atol=1e-4, rtol=0)
    mus = best_mu(TUNED.expand(2, 3), BASE.expand(2, 3), torch.tensor([0, 1]))
    wanted = torch.tensor([-1.7193, 4.1567])
    torch.testing.assert_close(mus, wanted, atol=1e-4, rtol=0)


def test_the_direction_leads_to_the_base():
    def divergence(logits: torch.Tensor) -> float:
        log_p = logits.log_softmax(-1)
        return (log_p.exp() * (log_p - BASE)).sum().item()

    assert divergence(TUNED) == pytest.approx(0.08512, abs=1e-5)
    assert divergence(steer(TUNED, BASE, 0.5, 0)) < divergence(TUNED)
    assert divergence(steer(TUNED, BASE, -0.5, 0)) > divergence(TUNED)


logits = st.lists(
    st.floats(-20, 20, width=32), min_size=5, max_size=5, unique=True
).map(torch.tensor)


@given(logits, logits, st.floats(-3, 3), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_it_is_the_reference(tuned, base, mu, keep):
    p = tuned.double().softmax(-1)
    if ((p - keep * p.max()).abs() < 1e-6).any() and keep < 1:
        return  # at the edge of what is kept
    wanted = steered_logits(tuned, base, mu, keep)
    found = steer(tuned, base, mu, keep).double()
    kept = wanted > -math.inf
    torch.testing.assert_close(found[kept], wanted[kept], atol=1e-4, rtol=1e-5)
    assert (found[~kept] < found[kept].min() - PRUNED / 2).all()


@given(logits, logits)
def test_without_mu_and_keep_nothing_changes(tuned, base):
    assert steer(tuned, base, 0.0, 0.0).equal(tuned)


@pytest.mark.parametrize("mu", [-1.0, 0.0, 2.0])
def test_impossible_tokens(mu):
    tuned = torch.tensor([1.0, 0.0, -math.inf, -math.inf])
    base = torch.tensor([0.5, 1.0, 0.0, -math.inf])
    found = steer(tuned, base, mu, 0.0)
    assert found[:2].isfinite().all() and (found[2:] == -math.inf).all()


def test_half_precision_is_steered_in_float32():
    tuned, base = torch.randn(2, 3, 64).bfloat16()
    found = steer(tuned, base, -1.0, 0.1)
    assert found.dtype == torch.float32
    assert found.equal(steer(tuned.float(), base.float(), -1.0, 0.1))


def test_what_is_kept():
    log_p = torch.tensor([0.6, 0.3, 0.07, 0.03]).log()
    assert is_kept(log_p, 0.1).tolist() == [True, True, True, False]
    assert is_kept(log_p, 0).all()
    assert is_kept(log_p, 1).tolist() == [True, False, False, False]
    # The order of those that are not kept is the tuned model's.
    assert steer(log_p, log_p, 0.0, 0.5).argsort(descending=True).tolist() == [
        *range(4)
    ]
