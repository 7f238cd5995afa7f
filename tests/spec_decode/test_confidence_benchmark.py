# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks.confidence` counts, by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.confidence import Drafts, estimated, gained, one_late


def test_the_best_drafts_of_a_batch_are_verified():
    accepted = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    # Worth 1, 1, 0 and 0, 0, 0: nothing behind a rejection is accepted.
    fixed = torch.ones(2, 3)
    assert gained(accepted, fixed, 1) == pytest.approx(1 / 2)
    sure = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.9, 0.9]])
    # Reached and accepted by .9, .72, .07 and .2, .18, .16.
    assert gained(accepted, sure, 1) == pytest.approx(2 / 2)
    assert gained(accepted, accepted, 3) == pytest.approx(2 / 2)


def test_a_draft_is_judged_by_those_before_it():
    assert one_late(torch.tensor([[0.1, 0.2, 0.3]])).tolist() == [
        pytest.approx([1.0, 0.1, 0.2])
    ]


def test_the_estimator_learns_how_often_drafts_are_accepted():
    torch.manual_seed(0)
    log_odds = 2 * torch.randn(4000, 2)
    accepted = torch.sigmoid(0.7 * log_odds + torch.tensor([0.5, -1.0])).bernoulli()
    drafts = Drafts(accepted, log_odds, torch.zeros(4000, 2))
    found = estimated(log_odds[..., None], drafts, 3000)[:, :].logit()
    wanted = 0.7 * log_odds + torch.tensor([0.5, -1.0])
    assert (found - wanted).abs().mean() < 0.15
