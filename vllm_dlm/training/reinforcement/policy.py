# SPDX-License-Identifier: Apache-2.0
"""Policy gradients of diffusion language models: advantages, terms of a loss, updates.

A recipe says by `Term`s what is scored: log-probabilities of written tokens on canvases
of its choice, each with a weight. The gradient of a sum of terms is the sum of theirs,
so that each term goes backward by itself: memory for one forward, not for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from vllm_dlm.training.reinforcement.rollout_rows import RollOuts
from vllm_dlm.training.reinforcement.rollouts import LogitsAt, without_mask

Baseline: TypeAlias = Literal["mean", "leave-one-out", "z-score"]


def advantages(rewards: Tensor, group_size: int, baseline: Baseline) -> Tensor:
    """[N]: how much better each answer is than the others to its prompt.

    Args:
        rewards: [N], `group_size` answers to a prompt side by side.
        group_size: G, 2 or more.
        baseline: What is taken from a reward: the mean of its group; the mean of the
            others in it; or its mean, and the rest is divided by its standard
            deviation (0 where all rewards of a group are equal).
    """
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if baseline == "leave-one-out":
        centred = centred * group_size / (group_size - 1)
    elif baseline == "z-score":
        deviation = groups.std(1, correction=0, keepdim=True)
        centred = torch.where(deviation > 0, centred / deviation, 0.0)
    return centred.flatten()


def equal_groups(rewards: Tensor, group_size: int) -> Tensor:
    """[N / group_size] bool: groups with equal rewards, which teach nothing."""
    groups = rewards.view(-1, group_size)
    return (groups == groups[:, :1]).all(1)


def clipped_losses(
    new: Tensor, old: Tensor, advantage: Tensor, epsilon: float
) -> Tensor:
    """-min(r A, clip(r, 1 - epsilon, 1 + epsilon) A) with r = exp(new - old); [N]."""
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def divergences(new: Tensor, reference: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = reference - new, an estimate of their KL; [N]."""
    difference = reference - new
    return difference.exp() - difference - 1


def token_log_probabilities(
    logits_at: LogitsAt,
    ids: Tensor,
    valid: Tensor,
    where: Tensor,
    tokens: Tensor,
    mask_id: int,
) -> Tensor:
    """[N]: logarithm of the probability of each token, at temperature 1.

    Args:
        logits_at: the network.
        ids: [R, L], what it sees.
        valid: [R, L] bool.
        where: [R, L] bool, N positions.
        tokens: [N] int64, in the order of `ids[where]`.
        mask_id: a token that is never drawn.
    """
    logits = without_mask(logits_at(ids, valid, where), mask_id)
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


@dataclass
class Term:
    """A part of a loss: N written tokens, scored on some canvases.

    Its loss is the sum over its tokens of w (-min(r A, clip(r) A)) + v k, where k is
    the divergence from the reference.
    """

    log_probabilities: Callable[[LogitsAt], Tensor]
    """[N], by a network."""
    advantages: Tensor
    """A of each token, [N]."""
    weights: Tensor
    """w of each token, [N]."""
    reference_weights: Tensor
    """v of each token, [N]."""
    old: Tensor | None = field(default=None, repr=False)
    """[N]: by the network before the inner updates; None until somebody needs it."""
    reference: Tensor | None = field(default=None, repr=False)
    """[N]: by the network before the training; None without v and with `against_old`.
    """
    against_old: bool = False
    """Whether the reference is the network before the inner updates."""

    def loss(self, new: Tensor, epsilon: float) -> Tensor:
        """The loss of log-probabilities `new` [N]; `old` is set."""
        assert self.old is not None
        losses = self.weights * clipped_losses(new, self.old, self.advantages, epsilon)
        reference = self.old if self.against_old else self.reference
        if reference is not None:
            spread = divergences(new, reference)
            losses = losses + self.reference_weights * spread
        return losses.sum()


@torch.no_grad()
def refer(
    terms: Sequence[Term],
    logits_at: LogitsAt,
    reference: Callable[[], AbstractContextManager[LogitsAt]] | None,
    first: bool,
) -> None:
    """Have the networks of before score the tokens of an inner update.

    Args:
        terms: of the update; those that are scored already stay as they are.
        logits_at: the network that is trained, before all inner updates.
        reference: makes the network of before the training; None without divergences.
        first: whether it is the first inner update, whose own forward will say the old
            log-probabilities: that they are equal then is sure, to the bit.
    """
    for term in terms:
        if term.old is None and not first:
            term.old = term.log_probabilities(logits_at)
    if reference is None:
        return
    with reference() as reference_logits_at:
        for term in terms:
            if term.reference is None:
                term.reference = term.log_probabilities(reference_logits_at)


def backward(terms: Sequence[Term], logits_at: LogitsAt, epsilon: float) -> float:
    """Add the gradient of a loss, term by term; returns the loss."""
    total = 0.0
    for term in terms:
        new = term.log_probabilities(logits_at)
        if term.old is None:
            term.old = new.detach()
        loss = term.loss(new, epsilon)
        loss.backward()
        total += float(loss.detach())
    return total


def parts_of(num_rows: int, rows_at_once: int | None) -> Iterator[slice]:
    """Rows 0 to `num_rows` in parts that go through the network at once."""
    size = rows_at_once or max(num_rows, 1)
    for first in range(0, num_rows, size):
        yield slice(first, min(first + size, num_rows))


def trajectory_terms(
    rollouts: RollOuts,
    advantage: Tensor,
    weights: Tensor,
    reference_weights: Tensor,
    kept: Tensor | None = None,
    rows_at_once: int | None = None,
    against_old: bool = False,
) -> list[Term]:
    """Terms that score each token on the canvas of the step that wrote it.

    Args:
        rollouts: R rows; of neighbouring steps that are merged into one, all tokens are
            masked on its canvas.
        advantage: [R].
        weights: [R, L], 0 at tokens that are not scored.
        reference_weights: [R, L].
        kept: [R] bool: the others are left out; None keeps all.
        rows_at_once: Rows of a term; None takes all.
        against_old: as of `Term`.
    """
    counted = weights > 0
    if kept is not None:
        counted = counted & kept[:, None]
    terms = []
    for step in range(rollouts.num_steps):
        scored = rollouts.written(step) & counted
        rows = scored.any(1).nonzero()[:, 0]
        for part in parts_of(len(rows), rows_at_once):
            some = rollouts.take(rows[part])
            where = scored[rows[part]]
            score = partial(
                token_log_probabilities,
                ids=some.canvas(step),
                valid=some.valid,
                where=where,
                tokens=some.ids[where],
                mask_id=rollouts.mask_id,
            )
            of_row = advantage[rows[part]][:, None].expand(where.shape)
            terms.append(
                Term(
                    score,
                    of_row[where],
                    weights[rows[part]][where],
                    reference_weights[rows[part]][where],
                    against_old=against_old,
                )
            )
    return terms
