# SPDX-License-Identifier: Apache-2.0
"""Choice: a step's candidate tokens and their statistics (`candidates.py`).

And Tile: the rows of logits that they are made of at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from vllm_dlm.model_executor.planning.block_rows import BlockRows
    from vllm_dlm.model_executor.sampling.logits import Logits


class Choice(NamedTuple):
    """The tokens that a step may write: of rows [N] or, `spread`, of blocks [R, B]."""

    candidate: torch.Tensor
    """int64."""
    confidence: torch.Tensor
    """float32: the candidate's probability."""
    logsumexp: torch.Tensor
    """[N] float64, of the rows' logits, also where the rest is spread."""
    entropy: torch.Tensor | None
    """float32, nats; None if not asked for."""
    margin: torch.Tensor | None
    """float32; None if not asked for."""
    broken: torch.Tensor
    """bool: there is no token to choose. The largest of the row's logits is infinite or
    no number, or all that the request allows is -inf."""

    @classmethod
    def of_nothing(cls, device: torch.device, needs: set[str]) -> Choice:
        """No rows."""
        none = torch.empty(0, device=device)
        return cls(
            none.long(),
            none,
            none.double(),
            none if "entropy" in needs else None,
            none if "margin" in needs else None,
            none.bool(),
        )

    @classmethod
    def joined(cls, parts: list[Choice]) -> Choice:
        """The rows of one part after the other."""

        def join(*tensors: torch.Tensor | None) -> torch.Tensor | None:
            there = [tensor for tensor in tensors if tensor is not None]
            return torch.cat(there) if there else None

        return cls(*map(join, *parts))  # type: ignore[arg-type]

    def spread(self, blocks: BlockRows) -> Choice:
        """The rows of some blocks at their places, 0 where no row is read."""
        return Choice(
            blocks.spread(self.candidate),
            blocks.spread(self.confidence),
            self.logsumexp,
            None if self.entropy is None else blocks.spread(self.entropy),
            None if self.margin is None else blocks.spread(self.margin),
            blocks.spread(self.broken),
        )


@dataclass(frozen=True)
class Tile:
    """Some rows of a step's logits, n of them, and the positions they are read for."""

    logits: Logits
    values: torch.Tensor
    """[n, V]: this rank's part of them."""
    rows: slice
    """Which rows of `logits` these are."""
    own: slice
    """Which rows of `blocks` these are."""
    blocks: BlockRows
    """What is being decided: R canvases, or their branches."""
    masked: torch.Tensor
    """[n] bool: positions that may be written."""
    step: torch.Tensor
    """[R] int64: which noise is drawn with."""

    @property
    def slots_np(self) -> np.ndarray:
        """[n]: slot of each row's request."""
        return self.blocks.row_slots_np[self.own]
