# SPDX-License-Identifier: Apache-2.0
"""Views to try strategies on: the specification's worked block, and random ones."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from reference import procedures

from vllm_dlm.strategies.base import (
    Context,
    Decision,
    Strategy,
    View,
    numeric_fields,
)
from vllm_dlm.strategies.probabilities import Probabilities

# "C8": position 0 is decided already, 1..7 are masked.
C8 = [0.99, 0.97, 0.80, 0.55, 0.78, 0.93, 0.40, 0.76]

# Entropies in nats that distributions with these largest probabilities may have.
H8 = [0.06, 0.14, 0.60, 0.80, 0.53, 0.30, 1.40, 0.95]

# Five positions' distributions over three tokens, for rules that read entropies.
DISTRIBUTIONS = [
    [0.98, 0.01, 0.01],
    [0.90, 0.05, 0.05],
    [0.60, 0.30, 0.10],
    [0.86, 0.14, 0.00],
    [0.50, 0.50, 0.00],
]

MASK_ID = 99


class WholeLogits:
    """Logits [N, V] that exist."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def over(self, rows: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
        return [(slice(None), self.logits[rows])] if len(rows) else []


CPU = Context(device=torch.device("cpu"), model="no-such-model")


def make_view(
    confidence: list[list[float]] | torch.Tensor,
    masked: torch.Tensor | None = None,
    **changes: Any,
) -> View:
    """A view of given confidences [R, B]; all but position 0 masked by default."""
    confidence = torch.as_tensor(confidence, dtype=torch.float32)
    rows, width = confidence.shape
    if masked is None:
        masked = torch.ones(rows, width, dtype=torch.bool)
        masked[:, 0] = False
    candidate = torch.arange(width).repeat(rows, 1)
    view = View(
        tokens=torch.where(masked, MASK_ID, candidate),
        masked=masked,
        valid=torch.ones_like(masked),
        decided=~masked,
        positions=torch.arange(width).repeat(rows, 1),
        candidate=candidate,
        confidence=confidence,
        is_eos=torch.zeros_like(masked),
        step=torch.zeros(rows, dtype=torch.int64),
        scheduled=torch.ones(rows, dtype=torch.int64),
        steps=torch.full((rows,), width),
        progress=torch.zeros(rows),
        state={},
    )
    return replace(view, **changes)


def with_probabilities(view: View, probabilities: torch.Tensor) -> View:
    """The view with distributions [R, B, V], and what follows from them.

    Candidate, confidence, best token, entropy and margin become theirs.
    """
    rows, width, vocab = probabilities.shape
    logits = probabilities.reshape(-1, vocab).float().log()
    best = probabilities.float().topk(2, dim=-1)
    return replace(
        view,
        candidate=best.indices[..., 0],
        confidence=best.values[..., 0],
        best=best.indices[..., 0],
        best_confidence=best.values[..., 0],
        entropy=torch.special.entr(probabilities.float()).sum(dim=-1),
        margin=best.values[..., 0] - best.values[..., 1],
        probabilities=Probabilities(
            WholeLogits(logits),
            logits.logsumexp(dim=1),
            np.arange(rows * width).reshape(rows, width),
        ),
    )


def first_state(strategy: Strategy, rows: int) -> dict[str, torch.Tensor]:
    """What `View.state` holds in a block's first step."""
    return {
        name: torch.full((rows, *field.shape), field.fill, dtype=field.dtype)
        for name, field in strategy.state.items()
    }


def distributions_view() -> View:
    """One row of `DISTRIBUTIONS`, all masked."""
    probabilities = torch.tensor([DISTRIBUTIONS])
    confidence = probabilities.amax(dim=-1)
    return make_view(
        confidence,
        torch.ones_like(confidence, dtype=torch.bool),
        entropy=torch.special.entr(probabilities).sum(dim=-1),
    )


def random_view(seed: int, rows: int = 5, width: int = 8, ties: bool = False) -> View:
    """A random view with all statistics, short last blocks and decided positions.

    `ties` rounds the statistics so that many are equal.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> torch.Tensor:
        values = torch.rand(rows, width, generator=generator)
        return (values * 4).round() / 4 if ties else values

    length = torch.randint(1, width + 1, (rows, 1), generator=generator)
    valid = torch.arange(width) < length
    masked = (torch.rand(rows, width, generator=generator) < 0.7) & valid
    masked[:, 0] |= ~masked.any(dim=1)
    candidate = torch.randint(0, 90, (rows, width), generator=generator)
    return View(
        tokens=torch.where(masked, MASK_ID, candidate),
        masked=masked,
        valid=valid,
        decided=valid & ~masked,
        positions=torch.arange(width).repeat(rows, 1),
        candidate=candidate,
        confidence=torch.where(valid, uniform() ** 0.2, 0.0),
        is_eos=(torch.rand(rows, width, generator=generator) < 0.2) & valid,
        step=torch.randint(0, width, (rows,), generator=generator),
        scheduled=torch.randint(1, width + 1, (rows,), generator=generator),
        steps=torch.randint(1, width + 1, (rows,), generator=generator),
        progress=torch.rand(rows, generator=generator),
        state={},
        entropy=uniform() * 3,
        margin=uniform(),
        uniform=uniform() * 0.99,  # less than 1
    )


def take_rows(view: View, index: torch.Tensor) -> View:
    """The view with rows [n] of `index`, in that order."""
    return view.take(index.numpy(), view.masked.shape[1])


def below(upper: View, lower: View) -> View:
    """The rows of two views, one below the other; `probabilities` are dropped."""

    def join(name: str) -> Any:
        one, other = getattr(upper, name), getattr(lower, name)
        if isinstance(one, dict):
            return {key: torch.cat([one[key], other[key]]) for key in one}
        if one is None or isinstance(one, Probabilities):
            return None
        return torch.cat([one, other])

    return View(**{field.name: join(field.name) for field in fields(View)})


def row_params(strategy: Strategy, rows: int) -> dict[str, torch.Tensor]:
    """The strategy's own numeric parameters for every row."""
    return {
        name: torch.tensor([getattr(strategy.params, name)] * rows)
        for name in numeric_fields(type(strategy.params))
    }


def select(strategy: Strategy, view: View) -> Decision:
    """One step with the strategy's own parameters in every row."""
    if strategy.state and not view.state:
        view = replace(view, state=first_state(strategy, view.masked.shape[0]))
    return strategy.select(view, row_params(strategy, view.masked.shape[0]))


def chosen(strategy: Strategy, view: View) -> list[list[int]]:
    """Positions that one step commits, per row."""
    commit = select(strategy, view).commit
    return [row.nonzero()[:, 0].tolist() for row in commit]


def expected(rule: procedures.Rule, view: View) -> list[list[int]]:
    """Positions that the row-wise reference commits."""
    rows = range(view.masked.shape[0])
    return [sorted(rule.step(row_of(view, row)).commit) for row in rows]


def row_of(view: View, row: int) -> procedures.View:
    """One row as the row-wise reference sees it; cut where invalid."""
    size = int(view.valid[row].sum())
    return procedures.View(
        masked=view.masked[row, :size],
        argmax=view.candidate[row, :size],
        confidence=view.confidence[row, :size],
        margin=torch.empty(0) if view.margin is None else view.margin[row, :size],
        entropy=torch.empty(0) if view.entropy is None else view.entropy[row, :size],
        first=0,
        forward=row,
        scheduled=int(view.scheduled[row]),
        step=int(view.step[row]),
        steps=int(view.steps[row]),
        decided=view.decided[row, :size],
    )


def assert_rows_independent(strategy: Strategy, view: View, seed: int = 0) -> None:
    """Shuffling rows or changing the others never moves a row's decision."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = view.masked.shape
    whole = select(strategy, view)
    order = torch.randperm(rows, generator=generator)
    shuffled = select(strategy, take_rows(view, order))
    assert torch.equal(shuffled.commit, whole.commit[order])
    stranger = random_view(seed + 1, rows, width)
    stranger = replace(stranger, state=view.state)
    for row in range(rows):
        mixed = below(stranger, take_rows(view, torch.tensor([row])))
        got = select(strategy, mixed)
        assert torch.equal(got.commit[-1], whole.commit[row])
        if whole.truncate_at is not None and got.truncate_at is not None:
            assert got.truncate_at[-1] == whole.truncate_at[row]
