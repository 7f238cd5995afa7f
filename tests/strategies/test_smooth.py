# SPDX-License-Identifier: Apache-2.0
"""Iteration smoothing: which masks are written, and what the others remember."""

from __future__ import annotations

import pytest
import torch
from reference.views import CPU, make_view, select

from vllm_dlm.strategies.smooth import Smooth, SmoothParams
from vllm_dlm.testing import check_strategy


def smooth(**params: float) -> Smooth:
    return Smooth(SmoothParams(**params), 3, CPU)


def step(confidence: list[float], number: int, masked: list[bool] | None = None):
    view = make_view(
        [confidence],
        torch.tensor([masked or [True] * 3]),
        step=torch.tensor([number]),
    )
    return select(smooth(), view)


@pytest.mark.parametrize(
    ("number", "bound"), [(0, 1.0), (1, 0.98), (9, 0.82), (10, 0.8), (30, 0.8)]
)
def test_the_bound_falls_to_the_threshold(number: int, bound: float):
    above, below = bound + 1e-3, bound - 1e-3
    decision = step([above, 1.5, below], number)
    assert decision.commit.tolist() == [[True, True, False]]


def test_the_best_is_written_with_what_equals_it():
    decision = step([0.3, 0.3 - 5e-6, 0.2], 0)
    assert decision.commit.tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    ("number", "weight"), [(0, 0.15), (1, 0.17), (7, 0.29), (8, 0.3), (30, 0.3)]
)
def test_the_weight_grows(number: int, weight: float):
    soft = step([0.9, 0.5, 0.4], number, [True, True, False]).soft
    assert soft is not None and soft.ids is None
    # What is written, and what was, is fed as it is.
    assert soft.where.tolist() == [[False, True, False]]
    assert soft.weights[0, 1].tolist() == pytest.approx([weight])


def test_the_contract():
    check_strategy(Smooth, compiling="trace", required=True)
