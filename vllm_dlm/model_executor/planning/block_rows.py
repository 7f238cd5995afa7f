# SPDX-License-Identifier: Apache-2.0
"""BlockRows: active blocks, and the rows of a forward whose logits are read for them.

And how a plan's arrays reach the device: all of them in one transfer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class BlockRows:
    """R active blocks, and the rows of a forward whose logits are read for them.

    Blocks are of different lengths, and of each only some positions are read. Tensors
    are on the engine's device; names of arrays on the host end in `_np`.
    """

    slots: torch.Tensor
    """[R] int64: state slot of each block's request."""
    slots_np: np.ndarray
    """`slots` on the host."""
    positions: torch.Tensor
    """[R, B] int64: absolute positions of the active blocks."""
    valid: torch.Tensor
    """[R, B] bool: False past the block or the canvas."""
    readable: torch.Tensor
    """[R, B] bool: valid, and this forward computes the row that predicts it."""
    logits_rows: torch.Tensor
    """[N] int64: rows of the forward that go through lm_head, request by request: those
    of the block's masks, or of all its positions where the strategy reads them."""
    row_places: torch.Tensor
    """[N] int64: where each of these rows belongs in a flattened [R, B] tensor."""
    row_at: torch.Tensor
    """[R, B] int64: which of these rows each position has; -1 for none."""
    row_request_np: np.ndarray
    """[N]: the request that each row belongs to, counted from 0 to R - 1."""
    row_offset_np: np.ndarray
    """[N]: the row's place in its block."""
    row_request: torch.Tensor
    """[N] int64: `row_request_np` on the device."""

    @property
    def row_at_np(self) -> np.ndarray:
        """[R, B] int64: `row_at` on the host."""
        rows = np.full(self.positions.shape, -1)
        rows[self.row_request_np, self.row_offset_np] = np.arange(
            len(self.row_request_np)
        )
        return rows

    @property
    def row_slots_np(self) -> np.ndarray:
        """[N]: state slot of each row's request."""
        slots: np.ndarray = self.slots_np[self.row_request_np]
        return slots

    def spread(self, values: torch.Tensor, fill: float = 0) -> torch.Tensor:
        """[R, B]: values [N] of the rows, each at its place, `fill` elsewhere."""
        shape = self.positions.shape
        if len(values) == shape.numel():
            return values.view(shape)
        whole = values.new_full((shape.numel(),), fill)
        whole[self.row_places] = values
        return whole.view(shape)


@dataclass(frozen=True)
class Cells:
    """Where the valid positions of blocks [R, B] are in tensors [slots, positions]."""

    places: torch.Tensor
    """[M] int64: in the flattened blocks."""
    cells: torch.Tensor
    """[M] int64: in the flattened tensor."""

    def write(self, store: torch.Tensor, values: torch.Tensor) -> None:
        """Put the valid ones of values [R, B] into `store`."""
        values = values.flatten()[self.places].to(store.dtype)
        store.view(-1).index_copy_(0, self.cells, values)


def upload(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """The arrays as int64 tensors on a device, in one transfer that waits for nothing.

    Args:
        arrays: of integers or booleans, any shapes.
    """
    packed = np.concatenate([array.ravel().astype(np.int64) for array in arrays])
    tensor = torch.from_numpy(packed)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    tensor = tensor.to(device, non_blocking=True)
    parts = tensor.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def upload_named(
    device: torch.device, arrays: Mapping[str, np.ndarray]
) -> dict[str, torch.Tensor]:
    """As `upload`, by name; booleans stay booleans."""
    tensors = upload(device, *arrays.values())
    return {
        name: tensor.bool() if array.dtype == np.bool_ else tensor
        for (name, array), tensor in zip(arrays.items(), tensors, strict=True)
    }
