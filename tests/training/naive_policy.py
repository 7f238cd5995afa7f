# SPDX-License-Identifier: Apache-2.0
"""A second implementation of the policy gradients, on a toy network.

Plain loops over rows, steps and tokens, one softmax after the other, with autograd for
the gradient of the whole sum.
"""

from __future__ import annotations

import math

import torch

from vllm_dlm.training.reinforcement.rollout_rows import RollOuts

MASK, V = 3, 4
PROMPTS, CANVAS = [1, 2, 1, 1], 3
GROUP = 2
REWARDS = torch.tensor([1.0, 0.0, 0.25, 1.0])
BETA, EPSILON = 0.04, 0.2


class Toy(torch.nn.Module):
    """Logits of a position from its place, and from all tokens of its row."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.places = torch.nn.Parameter(torch.randn(8, V))
        self.seen = torch.nn.Parameter(torch.randn(V, V))

    def row(self, ids: list[int]) -> torch.Tensor:
        """[L, V]: of one row alone."""
        rows = [self.seen[i] * (k + 1) for k, i in enumerate(ids)]
        return self.places[: len(ids)] + torch.stack(rows).sum(0) / 5

    def logits_at(self, ids, valid, where):
        weights = valid * (torch.arange(ids.shape[1]) + 1.0)
        seen = (self.seen[ids] * weights[..., None]).sum(1, keepdim=True) / 5
        return (self.places[: ids.shape[1]] + seen)[where]


def make_rollouts() -> RollOuts:
    """Four rows with steps that differ, some at a time, an end (0) in two of them."""
    lengths = torch.tensor(PROMPTS)
    width = max(PROMPTS) + CANVAS
    columns = torch.arange(width)
    valid = columns < lengths[:, None] + CANVAS
    answers = torch.tensor([[2, 0, 1], [1, 2, 2], [0, 0, 2], [1, 1, 0]])
    orders = torch.tensor([[0, 0, 1], [1, 0, 0], [2, 1, 0], [0, 1, 1]])
    ids = torch.full((4, width), 1)
    steps = torch.full((4, width), -1)
    response = valid & (columns >= lengths[:, None])
    ids[response], steps[response] = answers.flatten(), orders.flatten()
    return RollOuts(ids, lengths, valid, steps, torch.zeros(4, width), MASK)


def naive_log_probability(toy, row: list[int], place: int, token: int):
    logits = toy.row(row)[place]
    total = sum(logits[v].exp() for v in range(V) if v != MASK)
    return logits[token] - total.log()


def rows_of(rollouts: RollOuts):
    """Of each row: ids, prompt length, step of each place."""
    for r in range(4):
        end = PROMPTS[r] + CANVAS
        yield r, rollouts.ids[r, :end].tolist(), rollouts.steps[r, :end].tolist()


def masked(row: list[int], hidden) -> list[int]:
    return [MASK if i in hidden else token for i, token in enumerate(row)]


def naive_token_loss(new, old, reference, advantage: float):
    ratio = (new - old).exp()
    bound = min(max(ratio.item(), 1 - EPSILON), 1 + EPSILON)
    first, second = ratio * advantage, torch.tensor(bound * advantage)
    surrogate = first if first.item() <= second.item() else second
    if math.isclose(bound, ratio.item(), rel_tol=1e-6):
        surrogate = first
    gap = reference - new
    return -surrogate, gap.exp() - gap - 1


def naive_cj(new, old, reference, rollouts, advantage, groups_of_steps: int = 1):
    steps = {}
    for r, row, order in rows_of(rollouts):
        for place, step in enumerate(order):
            if step >= 0:
                steps.setdefault(step, []).append((r, row, order, place))
    loss = 0
    for step, tokens in steps.items():
        for r, row, order, place in tokens:
            canvas = masked(row, [i for i, s in enumerate(order) if s >= step])
            scores = [
                naive_log_probability(net, canvas, place, row[place])
                for net in (new, old, reference)
            ]
            gain, spread = naive_token_loss(
                scores[0], scores[1].detach(), scores[2].detach(), float(advantage[r])
            )
            loss = loss + (gain + BETA * spread) / len(tokens) / len(steps)
    return loss


def naive_trace(new, old, reference, rollouts, advantage, shrink: int):
    pairs = []
    for r, row, order in rows_of(rollouts):
        states = [s // shrink if s >= 0 else -1 for s in order]
        for state in sorted(set(states) - {-1}):
            canvas = masked(row, [i for i, s in enumerate(states) if s >= state])
            gains, spreads = [], []
            for place, s in enumerate(states):
                if s == state:
                    scores = [
                        naive_log_probability(net, canvas, place, row[place])
                        for net in (new, old, reference)
                    ]
                    gain, spread = naive_token_loss(
                        scores[0],
                        scores[1].detach(),
                        scores[2].detach(),
                        float(advantage[r]),
                    )
                    gains.append(gain)
                    spreads.append(spread)
            pairs.append(sum(gains) / len(gains) + BETA * sum(spreads))
    return sum(pairs) / len(pairs)


def naive_coupled(new, old, reference, rollouts, advantage, masks, one_step=False):
    losses = []
    for r, row, order in rows_of(rollouts):
        answer = [i for i, s in enumerate(order) if s >= 0]
        first = [i for i in answer if masks.first[r, i]]
        rest = [i for i in answer if i not in first]
        prompt = [i for i in range(PROMPTS[r]) if masks.prompt[r, i]]
        for place in answer:
            if row[place] == 0 or 0 not in [row[i] for i in answer if i < place]:
                scores = []
                for net in (new, old, reference):
                    hidden = answer + (prompt if one_step else [])
                    score = naive_log_probability(
                        net, masked(row, hidden), place, row[place]
                    )
                    if not one_step:
                        part = first if place in first else rest
                        share = masks.share if place in first else 1 - masks.share
                        again = naive_log_probability(
                            net, masked(row, part), place, row[place]
                        )
                        score = 0.5 * (score + again / share)
                    scores.append(score)
                gain, spread = naive_token_loss(
                    scores[0],
                    scores[1].detach(),
                    scores[2].detach(),
                    float(advantage[r]),
                )
                losses.append(gain + BETA * spread)
            if row[place] == 0:
                break
    return sum(losses) / len(losses)
