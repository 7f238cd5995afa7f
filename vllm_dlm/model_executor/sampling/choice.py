# SPDX-License-Identifier: Apache-2.0
"""Choice: a step's candidate tokens and their statistics (`candidates.py`).

And Tile: the rows of logits that they are made of at a time.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from vllm_dlm.model_executor.planning.block_rows import BlockRows, Blocks
    from vllm_dlm.model_executor.sampling.logits import Logits


_MEASURED = 5
"""Columns of `Choice` that every step has, the first ones."""


class Choice(NamedTuple):
    """What rows [N] of logits, or blocks [R, B] `at` them, may write."""

    candidate: torch.Tensor
    """int64: a token."""
    confidence: torch.Tensor
    """float32: the candidate's probability."""
    logsumexp: torch.Tensor
    """float64, of the row's logits; -inf where nothing of them is allowed."""
    entropy: torch.Tensor
    """float32, nats; of no meaning where no strategy asks for it."""
    margin: torch.Tensor
    """float32; as entropy."""
    other: torch.Tensor
    """int64: the best of the other tokens that are text; as entropy."""
    best: torch.Tensor
    """int64: the best of all tokens that are allowed, whatever is drawn; as entropy."""
    best_confidence: torch.Tensor
    """float32: its probability; as entropy."""

    @classmethod
    def room_for(cls, num_rows: int, device: torch.device) -> Choice:
        """Memory for the rows of a step, [num_rows] each."""

        def column(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(num_rows, dtype=dtype, device=device)

        number = torch.float32
        return cls(
            column(torch.int64),
            column(number),
            column(torch.float64),
            column(number),
            column(number),
            column(torch.int64),
            column(torch.int64),
            column(number),
        )

    def part(self, rows: slice) -> Choice:
        """Some of the rows; writing to the part writes to the whole."""
        return Choice(*(column[rows] for column in self))

    @property
    def measured(self) -> tuple[torch.Tensor, ...]:
        """The columns that `write_stats` writes: all that every step has."""
        return self[:_MEASURED]

    @property
    def broken(self) -> torch.Tensor:
        """bool: there is no token to choose.

        The largest of the row's logits is infinite or no number, or all that the
        request allows is -inf (`Candidates.choose`).
        """
        return ~self.logsumexp.isfinite()

    def at(self, blocks: Blocks, needs: Collection[str] = ()) -> Choice:
        """The rows of some blocks at their places [R, B], 0 where none is read.

        (0 is finite: what is not read is not broken.)

        Args:
            needs: columns that are read besides those that every step has: "other", and
                "best" for both of them; the others are left as they are.
        """
        has_row, rows = blocks.has_row, blocks.row_at.clamp(min=0)

        def placed(column: torch.Tensor) -> torch.Tensor:
            return torch.where(has_row, column[rows], 0)

        at = Choice(*map(placed, self.measured), *self[_MEASURED:])
        if "other" in needs:
            at = at._replace(other=placed(self.other))
        if "best" in needs:
            best, sure = placed(self.best), placed(self.best_confidence)
            at = at._replace(best=best, best_confidence=sure)
        return at


@dataclass(frozen=True)
class Tile:
    """Some rows of a step's logits, n of them, and the positions they are read for."""

    logits: Logits
    values: torch.Tensor
    """[n, V]: this rank's part of them."""
    rows: slice
    """Which rows of `logits` these are."""
    blocks: BlockRows
    """What is being decided: R canvases of a group, or their branches."""
    masked: torch.Tensor
    """[n] bool: positions that may be written."""
    step: torch.Tensor
    """[R] int64: which noise is drawn with."""

    @property
    def own(self) -> slice:
        """Which of the n rows of `blocks` these are."""
        first = self.blocks.first_row
        return slice(self.rows.start - first, self.rows.stop - first)

    @property
    def slots_np(self) -> np.ndarray:
        """[n]: slot of each row's request."""
        return self.blocks.row_slots_np[self.own]
