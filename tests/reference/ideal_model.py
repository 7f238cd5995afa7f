# SPDX-License-Identifier: Apache-2.0
"""A model that knows its task exactly, and a strategy's chances with it.

ParallelBench (arXiv 2510.04767) asks what writing tokens together costs. Where the
model is perfect, the rule alone answers that: here a task is the set of its right
answers, all equally likely, and the model's prediction at a position is the share of
them, among those that agree with what is written, that have a token there. Nothing is
sampled: every draw is followed, with its probability, so that `chance` is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from reference.registered import without_drafts
from reference.views import WholeLogits, first_state, row_params
from torch.nn.functional import one_hot

from vllm_dlm.strategies.base import (
    Decision,
    Strategy,
    View,
    best_masked,
)
from vllm_dlm.strategies.probabilities import Probabilities


@dataclass(frozen=True)
class Task:
    """Right answers [K, n] int64, tokens from 0 to `mask_id` - 1."""

    answers: torch.Tensor
    mask_id: int

    @property
    def length(self) -> int:
        return self.answers.shape[1]

    def agreeing(self, tokens: torch.Tensor) -> torch.Tensor:
        """[R, K] bool: which answers agree with texts [R, n], masks left open."""
        written = one_hot(tokens, self.mask_id + 1)[..., : self.mask_id].flatten(1)
        answers = one_hot(self.answers, self.mask_id + 1)[..., : self.mask_id]
        # By a matrix product: [R, K, n] would not fit.
        same = written.float() @ answers.flatten(1).float().T
        return same == (tokens != self.mask_id).sum(dim=1, keepdim=True)

    def predict(self, tokens: torch.Tensor) -> torch.Tensor:
        """[R, n, V] float64: exact marginals; of all answers, where none agrees."""
        agreeing = self.agreeing(tokens)
        agreeing |= ~agreeing.any(dim=1, keepdim=True)
        tokens_of = one_hot(self.answers, self.mask_id + 1)
        counts = torch.einsum("rk,knv->rnv", agreeing.double(), tokens_of.double())
        return counts / agreeing.sum(dim=1)[:, None, None]


def copy(length: int) -> Task:
    """One right answer: its tokens do not depend on each other."""
    return Task(torch.arange(length)[None], length)


def replace_any(length: int) -> Task:
    """The input with any one token replaced by a new one."""
    answers = torch.arange(length).repeat(length, 1)
    return Task(answers.fill_diagonal_(length), length + 1)


def shuffle(length: int) -> Task:
    """Any order of the tokens (the input's own as well)."""
    return Task(torch.tensor(list(permutations(range(length)))), length)


@dataclass(frozen=True)
class Chance:
    """Probabilities of how a decode ends; they sum to 1."""

    right: float
    wrong: float
    wrong_one_by_one: float
    """Part of `wrong`: no step has written more than one token."""


@dataclass
class _Texts:
    """Unfinished texts, and how likely each is."""

    tokens: torch.Tensor
    weight: torch.Tensor
    one_by_one: torch.Tensor
    state: dict[str, torch.Tensor]

    def take(self, index: torch.Tensor) -> _Texts:
        return _Texts(
            self.tokens[index],
            self.weight[index],
            self.one_by_one[index],
            {name: value[index] for name, value in self.state.items()},
        )


def chance(
    strategy: Strategy, task: Task, scheduled: int = 1, drawn: bool = False
) -> Chance:
    """How likely it is that a strategy decodes a right answer as one block.

    Args:
        strategy: built for `task.length` positions.
        scheduled: tokens per step of the step schedule.
        drawn: tokens are drawn from the marginals; else the most probable one is taken,
            and where several are, a fair die of each position's own says which.
    """
    texts = _Texts(
        torch.full((1, task.length), task.mask_id),
        torch.ones(1, dtype=torch.float64),
        torch.ones(1, dtype=torch.bool),
        first_state(strategy, 1),
    )
    right = wrong = wrong_one_by_one = 0.0
    for step in range(strategy.step_limit(strategy.params)):
        texts, view = _predicted(task, _merged(texts), step, scheduled, drawn)
        params = row_params(strategy, len(texts.weight))
        decision = _wrapped(strategy, view, strategy.select(view, params))
        finished = _apply(task, texts, view, decision)
        found = task.agreeing(texts.tokens).any(dim=1)
        right += texts.weight[finished & found].sum().item()
        wrong += texts.weight[finished & ~found].sum().item()
        lost = finished & ~found & texts.one_by_one
        wrong_one_by_one += texts.weight[lost].sum().item()
        if finished.all():
            return Chance(right, wrong, wrong_one_by_one)
        texts = texts.take(~finished)
    raise AssertionError("a block has outlasted the strategy's step limit")


def _merged(texts: _Texts) -> _Texts:
    """Texts that a strategy cannot tell apart become one."""
    columns = [texts.tokens, texts.one_by_one[:, None], *texts.state.values()]
    keys = torch.cat([value.flatten(1).double() for value in map(_wide, columns)], 1)
    unique, inverse = keys.unique(dim=0, return_inverse=True)
    first = torch.full((len(unique),), len(keys))
    first.scatter_reduce_(0, inverse, torch.arange(len(keys)), "amin")
    merged = texts.take(first)
    merged.weight = torch.zeros(len(unique), dtype=torch.float64)
    merged.weight.scatter_add_(0, inverse, texts.weight)
    return merged


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value if value.dim() > 1 else value[:, None]


def _predicted(
    task: Task, texts: _Texts, step: int, scheduled: int, drawn: bool
) -> tuple[_Texts, View]:
    """Every text with every way its candidates may fall, and what a strategy sees."""
    probabilities = task.predict(texts.tokens)
    best = probabilities == probabilities.amax(dim=-1, keepdim=True)
    odds = probabilities if drawn else best.double() / best.sum(dim=-1, keepdim=True)
    # Of decided positions only the model's opinion is told: nothing is drawn.
    masked = texts.tokens == task.mask_id
    candidate = probabilities.argmax(dim=-1)
    index = torch.arange(len(texts.weight))
    weight = texts.weight
    for place in range(task.length):
        open_ = masked[index, place]
        fixed = one_hot(candidate[:, place], odds.shape[2])
        way = torch.where(open_[:, None], odds[index, place], fixed.double())
        row, token = way.nonzero(as_tuple=True)
        index, candidate = index[row], candidate[row].clone()
        candidate[:, place] = token
        weight = weight[row] * way[row, token]
    texts = texts.take(index)
    texts.weight = weight
    return texts, _view(task, texts, probabilities[index], candidate, step, scheduled)


def _view(
    task: Task,
    texts: _Texts,
    probabilities: torch.Tensor,
    candidate: torch.Tensor,
    step: int,
    scheduled: int,
) -> View:
    rows, length = texts.tokens.shape
    masked = texts.tokens == task.mask_id
    best, tokens = probabilities.topk(2, dim=-1)
    chosen = probabilities.gather(2, candidate[..., None])[..., 0]
    logits = probabilities.flatten(0, 1).log()
    generator = torch.Generator().manual_seed(step)
    view = View(
        tokens=texts.tokens,
        masked=masked,
        valid=torch.ones_like(masked),
        decided=~masked,
        positions=torch.arange(length).expand(rows, length),
        candidate=candidate,
        confidence=chosen.float(),
        is_eos=torch.zeros_like(masked),
        step=torch.full((rows,), step),
        scheduled=torch.full((rows,), scheduled),
        steps=torch.full((rows,), -(-length // scheduled)),
        progress=(~masked).float().mean(dim=1),
        state=texts.state,
        entropy=torch.special.entr(probabilities).sum(dim=-1).float(),
        margin=(best[..., 0] - best[..., 1]).float(),
        # Of equal ones, the one that was chosen.
        best=torch.where(chosen == best[..., 0], candidate, tokens[..., 0]),
        best_confidence=best[..., 0].float(),
        # Any order of the positions is as good: the tasks are symmetric in them.
        uniform=torch.rand(length, generator=generator).expand(rows, length),
        probabilities=Probabilities(
            WholeLogits(logits),
            logits.logsumexp(dim=1),
            np.arange(rows * length).reshape(rows, -1),
        ),
    )
    return without_drafts(view)


def _wrapped(strategy: Strategy, view: View, decision: Decision) -> Decision:
    """What the engine makes of a decision: progress in each step, an end."""
    nothing = torch.zeros_like(view.masked)

    def allowed(mask: torch.Tensor | None) -> torch.Tensor:
        free = view.decided & strategy.may_rewrite
        return nothing if mask is None else mask & free

    commit = decision.commit & view.masked
    edit = allowed(decision.edit)
    remask = allowed(decision.remask) & ~edit
    stalled = commit.sum(dim=1) <= remask.sum(dim=1)
    stalled &= view.masked.any(dim=1)
    if decision.idle is not None:
        stalled &= ~decision.idle
    commit |= best_masked(view) & stalled[:, None]
    hold = nothing[:, 0] if decision.hold is None else decision.hold
    if int(view.step[0]) + 1 >= strategy.step_limit(strategy.params):
        commit, hold = view.masked, nothing[:, 0]
        edit = remask = nothing
    tokens = view.candidate if decision.new_tokens is None else decision.new_tokens
    state = {**view.state, **(decision.state or {})}
    return Decision(commit, tokens, edit, remask, hold, state=state)


def _apply(task: Task, texts: _Texts, view: View, decision: Decision) -> torch.Tensor:
    """Write a decision into the texts; [R] bool: which are finished."""
    assert decision.edit is not None and decision.remask is not None
    assert decision.new_tokens is not None and decision.hold is not None
    write = decision.commit | decision.edit
    tokens = torch.where(write, decision.new_tokens, texts.tokens)
    texts.tokens = torch.where(decision.remask, task.mask_id, tokens)
    texts.one_by_one &= write.sum(dim=1) <= 1
    texts.state = dict(decision.state or {})
    return ~(texts.tokens == task.mask_id).any(dim=1) & ~decision.hold
