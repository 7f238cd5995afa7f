# SPDX-License-Identifier: Apache-2.0
"""DreamOn's loop in plain torch: a hole that widens and narrows, one text at a time.

Written from the paper (arXiv 2602.01326) and from what its published code does, step by
step; lists of tokens, and no tensors but logits. As in this package, a mask is never
written. Where several masks of one step ask for two and not all have room, the others,
counted from the left, stay masks (the published code cuts off the suffix there).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

Choose = Callable[[torch.Tensor], list[int]]
"""Of the distributions [n, V] of the hole's n masks: which of them are written."""

Draw = Callable[[torch.Tensor, list[int], int], torch.Tensor]
"""Of logits [n, V], the masks' places in the text, and the step: tokens [n]."""


class Network(Protocol):
    """What fills the hole."""

    def forward(self, input_ids: list[int]) -> torch.Tensor:
        """[n, V]: logits of all rows."""
        ...


@dataclass
class Filled:
    """A hole that has no mask left."""

    tokens: list[int]
    forwards: int
    lengths: list[int]
    """Positions of the hole before each forward."""
    seen: Counter = field(default_factory=Counter)
    """How often "text", "goes" and "widens" were written, what was to widen and had no
    room ("again"), and forwards in which the token that widens was "barred"."""


def entropy_of(probs: torch.Tensor) -> torch.Tensor:
    """[n] in nats."""
    return -torch.where(probs > 0, probs * probs.log(), 0.0).sum(dim=-1)


def least_entropy(number: int = 1) -> Choose:
    """The published choice: so many of the least uncertain masks."""

    def choose(probs: torch.Tensor) -> list[int]:
        order = torch.argsort(entropy_of(probs.double()), stable=True)
        return sorted(order[:number].tolist())

    return choose


def at_least(threshold: float) -> Choose:
    """Every mask whose best token is so probable, and the surest."""

    def choose(probs: torch.Tensor) -> list[int]:
        best = probs.max(dim=-1).values
        surest = int(best.argmax())
        return sorted({surest, *(best >= threshold).nonzero()[:, 0].tolist()})

    return choose


def infill(
    model: Network,
    prefix: Sequence[int],
    suffix: Sequence[int],
    *,
    mask_id: int,
    expand_id: int,
    closing: set[int],
    most: int,
    initial: int = 4,
    shift: int = 0,
    choose: Choose | None = None,
    draw: Draw | None = None,
    shaped: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
) -> Filled:
    """Fill the hole between two texts.

    Args:
        closing: tokens that take their position away.
        most: positions that the hole has at the most.
        initial: masks that it begins with.
        shift: a position is predicted by the row so many to its left.
        choose: which masks are written in a step.
        draw: which tokens; the most probable ones without it.
        shaped: what temperature and the like make of logits.
    """
    choose = choose or least_entropy()
    hole = [mask_id] * min(initial, most)
    budget = 2 * (most + len(suffix))
    filled = Filled([], 0, [])
    while mask_id in hole:
        filled.lengths.append(len(hole))
        logits = model.forward([*prefix, *hole, *suffix]).clone()
        logits[:, mask_id] = -torch.inf
        if len(hole) == most or budget <= 0:
            logits[:, expand_id] = -torch.inf
            filled.seen["barred"] += 1
        masks = [i for i, token in enumerate(hole) if token == mask_id]
        logits = logits[[len(prefix) + i - shift for i in masks]]
        places = [len(prefix) + i for i in masks]
        best = logits.argmax(dim=-1)
        tokens = best if draw is None else draw(logits, places, filled.forwards)
        written = choose(shaped(logits).softmax(dim=-1))
        for number in written:
            hole[masks[number]] = int(tokens[number])
        after: list[int] = []
        room = most - len(hole)
        room += sum(hole[masks[number]] in closing for number in written)
        fresh = {masks[number] for number in written}
        for place, token in enumerate(hole):
            if place not in fresh:
                after.append(token)
            elif token in closing:
                filled.seen["goes"] += 1
            elif token != expand_id:
                filled.seen["text"] += 1
                after.append(token)
            elif room > 0 and budget > 0:
                filled.seen["widens"] += 1
                after += [mask_id, mask_id]
                room, budget = room - 1, budget - 1
            else:
                filled.seen["again"] += 1
                after.append(mask_id)
        hole = after
        filled.forwards += 1
    filled.tokens = hole
    return filled
