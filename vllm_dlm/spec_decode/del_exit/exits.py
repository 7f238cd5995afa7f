# SPDX-License-Identifier: Apache-2.0
"""DEL: after which layer, and how far, a model should draft for itself.

A draft leaves the model after `exit` of its L layers, through the model's own final
norm and lm_head. Each verified position tells what every exit would have said there
(its shadow token), drafted or not. From decayed counts of hits and misses follows each
exit's acceptance rate, and from that the pair (exit, length) with the most tokens per
layer computed. Written from the paper (DEL, arXiv 2504.05598); no vLLM import.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

PROMPT_WINDOW = 32
"""Last prompt positions from which the first round's statistics come."""

DEFAULT_EXITS = 8
"""Exits that are watched where the user names none: each costs an lm_head."""


@dataclass(frozen=True)
class Choice:
    """What a round drafts."""

    exit: int
    """Layers of a draft pass."""
    length: int
    """The best number of drafted tokens; 0 if no draft pays in this round."""
    most: int
    """Tokens that the draft may have at most, whatever pays."""
    threshold: float
    """What a token's probability is compared with; NaN while hits or misses of the
    exit are unknown, and then every token is probable enough."""
    least_product: float
    """One more token pays while the draft's tokens are right, all together, with at
    least this probability: it would yield product * acceptance tokens for `exit`
    layers, and the round as planned yields a rate of tokens per layer."""


def goes_on(
    stop: str, choice: Choice, drafted: int, confidence: float, product: float
) -> bool:
    """Whether a draft of one token or more gets another one.

    Args:
        stop: a value of DEL's option `stop`.
        choice: the round's.
        drafted: tokens of the draft.
        confidence: probability of its last token, by the exit.
        product: of the probabilities of all its tokens.
    """
    sure = not confidence < choice.threshold
    short = drafted < choice.length
    rules = {
        "both": sure and short,
        "confidence": sure,
        "length": short,
        "gain": product >= choice.least_product,
    }
    return rules[stop] and drafted < choice.most


class ExitStatistics:
    """Decayed counts of E exits' shadow tokens: hits, misses, and how sure they were.

    One per request, or one for all as a shared prior.
    """

    def __init__(self, exits: Sequence[int], decay: float = 0.95) -> None:
        """Start without any observation.

        Args:
            exits: [E] layers, ascending.
            decay: what is left of older counts after a round, 0 < decay <= 1.
        """
        if not exits or list(exits) != sorted(set(exits)) or exits[0] < 1:
            raise ValueError(f"exits must be ascending layers from 1, not {exits}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, not {decay}")
        self.exits = np.array(exits, np.int64)
        self.decay = decay
        # Row 0: misses, row 1: hits.
        self.counts = np.zeros((2, len(exits)))
        self.confidences = np.zeros((2, len(exits)))

    def update(
        self, hits: np.ndarray, confidences: np.ndarray, new_round: bool = True
    ) -> None:
        """Add a round's positions, up to the first that verification corrected.

        Args:
            hits: [N, E] bool, the shadow token is the target's.
            confidences: [N, E], the shadow token's probability.
            new_round: decay what was counted before; False for a prompt's chunks.
        """
        if new_round:
            self.counts *= self.decay
            self.confidences *= self.decay
        for row, mask in enumerate((~hits, hits)):
            self.counts[row] += mask.sum(axis=0)
            self.confidences[row] += (confidences * mask).sum(axis=0)

    @property
    def acceptance(self) -> np.ndarray:
        """[E] share of hits; NaN for what was never observed."""
        with np.errstate(invalid="ignore"):
            return self.counts[1] / self.counts.sum(axis=0)

    @property
    def thresholds(self) -> np.ndarray:
        """[E] a draft stops at a token less probable than this; NaN: it never does.

        Midway between how sure an exit is on average where it hits and where it misses.
        """
        with np.errstate(invalid="ignore"):
            return (self.confidences / self.counts).mean(axis=0)

    def choose(self, num_layers: int, most: int) -> Choice:
        """The best exit and length, by `choose`, and where a draft may stop."""
        exit, length = choose(self.exits, self.acceptance, num_layers, most)
        row = np.searchsorted(self.exits, exit)
        rate = np.nan_to_num(self.acceptance[row])
        needed = exit * tokens_per_layer(exit, length, rate, num_layers)
        return Choice(
            exit,
            length,
            most,
            threshold=float(self.thresholds[row]),
            least_product=needed / rate if rate else math.inf,
        )


def tokens_per_layer(
    exit: int, length: int, acceptance: float, num_layers: int
) -> float:
    """Tokens that a round yields on average, per layer that it computes.

    Args:
        exit: layers of a draft pass.
        length: drafted tokens d; the round computes d * exit + num_layers layers.
        acceptance: probability a that one more draft is accepted, 0 to 1; the round
            yields 1 + a + ... + a^d tokens.
        num_layers: layers of the target.
    """
    table = _table(np.array([exit]), np.array([acceptance]), num_layers, length)
    return float(table[0, -1])


def choose(
    exits: np.ndarray, acceptance: np.ndarray, num_layers: int, most: int
) -> tuple[int, int]:
    """The exit and the length with the most tokens per layer.

    Ties go to the shallower exit and the shorter draft. An exit without observations
    (NaN) is not drafted with.

    Args:
        exits: [E] layers, ascending.
        acceptance: [E] rates from 0 to 1.
        num_layers: layers of the target.
        most: longest draft, 0 or more.
    """
    table = _table(exits, np.nan_to_num(acceptance, nan=0.0), num_layers, most)
    row, length = np.unravel_index(table.argmax(), table.shape)
    return int(exits[row]), int(length)


def _table(
    exits: np.ndarray, acceptance: np.ndarray, num_layers: int, most: int
) -> np.ndarray:
    """[E, most + 1] tokens per layer of every exit and length."""
    lengths = np.arange(most + 1)
    # The sum itself: its closed form divides by zero at acceptance 1.
    tokens = np.cumsum(acceptance[:, None] ** lengths, axis=1)
    return tokens / (lengths * exits[:, None] + num_layers)


def resolve_exits(exits: Sequence[int] | None, num_layers: int) -> list[int]:
    """The exits to watch, ascending.

    Args:
        exits: the user's, or None for up to `DEFAULT_EXITS`, evenly spaced.
        num_layers: layers of the target.

    Raises:
        ValueError: an exit that the model does not have.
    """
    if num_layers < 2:
        raise ValueError(
            "DEL drafts with a part of the model's layers, and this model has only "
            f"{num_layers}"
        )
    if exits is None:
        count = min(DEFAULT_EXITS, num_layers - 1)
        spaced = np.linspace(0, num_layers, count + 2)[1:-1]
        return [int(layer) for layer in spaced.round()]
    wrong = [layer for layer in exits if not 1 <= layer < num_layers]
    if wrong:
        raise ValueError(
            f"exits: no draft can exit after layer {wrong[0]}: the model has "
            f"{num_layers} layers, so exits are 1 to {num_layers - 1}"
        )
    return sorted(set(exits))


def top_token(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable token and its probability.

    Args:
        logits: [N, V].

    Returns:
        [N] int64 and [N] float32.
    """
    best, token = logits.float().max(dim=-1)
    return token, (best - logits.float().logsumexp(dim=-1)).exp()
