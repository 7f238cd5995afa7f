# SPDX-License-Identifier: Apache-2.0
"""Probabilities of any token at the positions of a view (need "probabilities").

And what strategies make of them: a divergence, probabilities with credit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

TINY = 1e-12
"""Added to probabilities under a logarithm, as in the published code."""


class RowLogits(Protocol):
    """Rows of logits that may not all exist at a time (`sampling/logits.py`)."""

    def over(self, rows: torch.Tensor) -> Iterable[tuple[slice, torch.Tensor]]:
        """The logits of rows [n] int64, some rows at a time.

        Which of the n rows they are, and their logits [m, V].
        """


@dataclass(frozen=True)
class Probabilities:
    """The model's own distribution at the positions of a view, read on demand.

    Untempered and unrestricted, the mask id left out. Positions that are not read
    (`Strategy.logit_rows`) have probability 0 everywhere. Each call is one pass over
    the rows of the others, which may compute their logits again.
    """

    logits: RowLogits
    """Of this step, of all requests."""
    logsumexp: torch.Tensor
    """[N] float64."""
    rows: np.ndarray
    """[R, B] int64, on the host: each position's row of `logits`; -1 for none."""

    @cached_property
    def _read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[n] int64 each: positions that are read, in [R * B], and their rows."""
        rows, device = self.rows.ravel(), self.logsumexp.device
        (places,) = (rows >= 0).nonzero()
        both = torch.from_numpy(np.stack([places, rows[places]]))
        if device.type == "cuda":
            both = both.pin_memory()
        at, read = both.to(device, non_blocking=True)
        return at, read

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """[R, B, K] float32: probabilities of tokens [R, B, K] int64."""
        places, rows = self._read
        wanted = tokens.flatten(0, 1)[places]
        found = [
            self._normalized(logits.gather(1, wanted[part]), rows[part])
            for part, logits in self.logits.over(rows)
        ]
        return self._spread(found, torch.zeros(tokens.shape, device=tokens.device))

    def top(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The most probable tokens: probabilities float32 and ids int64, [R, B, K].

        K is `count`, or the vocabulary's size if that is smaller; 0 if no position is
        read. Only the view's own rows are sorted.
        """
        rows = self._read[1]
        values, ids = [], []
        for part, logits in self.logits.over(rows):
            best = logits.topk(min(count, logits.shape[1]), dim=1)
            values.append(self._normalized(best.values, rows[part]))
            ids.append(best.indices)
        size = values[0].shape[1] if values else 0
        none = torch.zeros(*self.rows.shape, size, device=self.logsumexp.device)
        return self._spread(values, none), self._spread(ids, none.long())

    def _normalized(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[m, K] float32: probabilities, of logits [m, K] in rows [m]."""
        return (logits - self.logsumexp[rows, None]).exp().float()

    def _spread(self, parts: list[torch.Tensor], whole: torch.Tensor) -> torch.Tensor:
        """`whole` [R, B, K] with the parts' rows, n in all, at their positions."""
        if parts:
            whole.flatten(0, 1).index_copy_(0, self._read[0], torch.cat(parts))
        return whole


def divergence(
    now: Probabilities, before: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """KL(now || before) over some tokens and the rest of the vocabulary.

    Merging tokens into a rest can only lower a divergence.

    Args:
        now: the distributions of this step.
        before: [R, B, K] float32: the tokens' probabilities one step ago. One of
            probability 0 is counted among the rest.
        tokens: [R, B, K] int64.

    Returns:
        [R, B] float32, nats.
    """
    kept = torch.where(before > 0, now.of(tokens), 0.0)
    rest = (1 - kept.sum(dim=-1)).clamp(min=0)
    rest_before = (1 - before.sum(dim=-1)).clamp(min=0)

    def terms(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return p * ((p + TINY).log() - (q + TINY).log())

    return terms(kept, before).sum(dim=-1) + terms(rest, rest_before)


def fused(
    probabilities: Probabilities,
    tokens: torch.Tensor,
    credit: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Probabilities of tokens with credit, among the whole vocabulary.

    Args:
        probabilities: the model's.
        tokens: [R, B, K] int64.
        credit: [R, B, K] float32; 0 where there is no such token.
        weight: power of 1 + credit; broadcasts to [R, B, K].

    Returns:
        [R, B, K] float32; 0 where there is no such token.
    """
    alone = torch.where(credit > 0, probabilities.of(tokens), 0.0)
    raise_by = (1 + credit) ** weight
    raised = alone * raise_by
    return raised / (1 + (alone * (raise_by - 1)).sum(dim=-1, keepdim=True))
