# SPDX-License-Identifier: Apache-2.0
"""Rows right of the active blocks whose logits are read: there a text may end.

The option `eotp=canvas` asks for them (`sampling/eotp.py`), and a canvas that may grow
(`sampling/growth.py`). They are rows that the forward computes in any case, so that how
far a request looks follows from its cache policy: to the end of its canvas, where all
of it is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch

from vllm_dlm.model_executor.planning.segments import ragged


class LookoutRows(NamedTuple):
    """n such rows, on the engine's device: the last rows of logits."""

    slots: torch.Tensor
    """[n] int32: state slot of each row's request."""
    positions: torch.Tensor
    """[n] int32: the position that each row predicts."""


@dataclass(frozen=True)
class HostLookoutRows:
    """The same on the host."""

    slots: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    """[n]: which rows of the forward they are."""

    @classmethod
    def none(cls) -> Self:
        """No rows."""
        nothing = np.zeros(0, dtype=np.int64)
        return cls(nothing, nothing, nothing)

    @classmethod
    def of(
        cls,
        slots: np.ndarray,
        *,
        starts: np.ndarray,
        ends: np.ndarray,
        first_rows: np.ndarray,
        shift: int,
    ) -> Self:
        """The rows of some requests [R].

        Args:
            slots: their state slots.
            starts, ends: [start, end) of the rows, as positions; there may be none.
            first_rows: row of the forward that position 0 would have.
            shift: how far left of a position the row is that predicts it.
        """
        request, nth = ragged(np.maximum(ends - starts, 0))
        source = starts[request] + nth
        return cls(slots[request], source + shift, first_rows[request] + source)

    def __add__(self, more: Self) -> Self:
        """These rows, and more behind them."""
        return type(self)(
            np.concatenate([self.slots, more.slots]),
            np.concatenate([self.positions, more.positions]),
            np.concatenate([self.rows, more.rows]),
        )
