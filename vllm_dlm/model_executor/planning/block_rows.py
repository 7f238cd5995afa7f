# SPDX-License-Identifier: Apache-2.0
"""Active blocks, and the rows of a forward whose logits are read for them.

Requests that decode by the same strategy and block length are decided together: a
group. What a step must know of a group's blocks is one small tensor of integers
(`pack`), which `Blocks` takes apart on the device, inside the compiled step too. What
the host knows of them beside is in `BlockRows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from vllm_dlm.model_executor.columns import Columns, Requests

SLOT, BATCH_ROW, CANVAS_END, ROWS_END, LEADS, HEAD_ROWS = range(6)
"""Columns of a packed group; behind them is one for each position of the block."""
ROWS_START, FIRST_ROW, READS, VOID_ROW = range(6, 10)
"""Further ones, of requests that run ahead, which `guesses.py` reads: where the
request's rows begin; the number of the first of them in the forward; 1 +
`HostSlots.reads`, 0 for requests that do not run ahead; and the row of the reply that
is no request's."""
COLUMNS = 10
NOT_READ, NOT_READABLE, NOT_VALID = -1, -2, -3
"""In a position's column, where it is not the number of the position's row: no row is
read for it; this forward has none; the block or the canvas ends before it."""


class Blocks(NamedTuple):
    """R active blocks of a group, B positions each; tensors on the engine's device.

    In a compiled step some of them may stand for nothing (`slots` names the table's
    dummy slot): what is computed for these goes nowhere.
    """

    slots: torch.Tensor
    """[R] int64: state slot of each block's request."""
    batch_rows: torch.Tensor
    """[R] int64: index of each request in vLLM's batch."""
    positions: torch.Tensor
    """[R, B] int64: absolute positions of the active blocks."""
    places: torch.Tensor
    """[R, B] int64: `positions`, or the table's last where there are no such."""
    valid: torch.Tensor
    """[R, B] bool: False past the block or the canvas."""
    readable: torch.Tensor
    """[R, B] bool: valid, and this forward computes the row that predicts it."""
    row_at: torch.Tensor
    """[R, B] int64: which row of logits each position has; negative for none."""
    canvas_end: torch.Tensor
    """[R] int64: one past each canvas' last position."""
    rows_ends: torch.Tensor
    """[R] int64: one past the last position computed for each, the rows of branches
    counted on from there."""
    leads: torch.Tensor
    """[R] bool: the rows end before the block, and predict its lead, the first
    position, alone."""
    head_rows: torch.Tensor
    """[R] int64: rows of logits to report with each request (`reply.py`)."""
    requests: Requests
    """What the request table says of each request before the step."""

    @property
    def has_row(self) -> torch.Tensor:
        """[R, B] bool: positions whose logits are read."""
        return self.row_at >= 0

    @property
    def width(self) -> int:
        """B."""
        return self.positions.shape[1]

    def write(self, store: torch.Tensor, values: torch.Tensor) -> None:
        """Put values [R, B] of valid positions into a column of the request table.

        Others go to the table's dummy slot, its last row.

        Args:
            store: [slots + 1, positions].
        """
        rows = torch.where(self.valid, self.slots[:, None], store.shape[0] - 1)
        store[rows, self.places] = values.to(store.dtype)

    @classmethod
    def unpacked(cls, packed: torch.Tensor, table: Columns) -> Blocks:
        """Take a packed group apart.

        Args:
            packed: [R, COLUMNS + B] integers, as of `pack`.
            table: the request table, as the step finds it.
        """
        width = packed.shape[1] - COLUMNS
        columns, row_at = packed.long().split([COLUMNS, width], dim=1)
        slots = columns[:, SLOT]
        requests = Requests.of(table, slots)
        offsets = torch.arange(width, device=packed.device)
        positions = requests.block_start[:, None] + offsets
        return cls(
            slots,
            columns[:, BATCH_ROW],
            positions,
            positions.clamp(max=table.length - 1),
            row_at > NOT_VALID,
            row_at > NOT_READABLE,
            row_at,
            columns[:, CANVAS_END],
            columns[:, ROWS_END],
            columns[:, LEADS] != 0,
            columns[:, HEAD_ROWS],
            requests,
        )


class GuessedRows(NamedTuple):
    """What becomes of n requests that run ahead if their forward is void.

    Tensors are on the engine's device.
    """

    batch_rows_np: np.ndarray
    """[n]: index of each request in vLLM's batch."""
    batch_rows: torch.Tensor
    """[n] int64: the same on the device."""
    num_rows: int
    """Rows that go through lm_head for them."""
    in_vain: torch.Tensor
    """[n] int32: rows of the forward that vLLM shall not count, if it is void."""
    is_left: torch.Tensor
    """[n] int32: 1 where all rows are left of the active block."""


@dataclass(frozen=True)
class BlockRows:
    """R active blocks of a group in one forward; names of host arrays end in `_np`."""

    slots_np: np.ndarray
    """[R]: state slot of each block's request."""
    batch_rows_np: np.ndarray
    """[R]: index of each request in vLLM's batch."""
    width: int
    """B, the group's block length."""
    row_at_np: np.ndarray
    """[R, B]: which row of logits each position has; `NOT_READ` and so on for none."""
    first_row: int
    """The first of the group's n rows of logits, which follow each other, request by
    request."""
    row_request_np: np.ndarray
    """[n]: the request that each row belongs to, counted from 0 to R - 1."""
    row_offset_np: np.ndarray
    """[n]: the row's place in its block."""
    packed_np: np.ndarray
    """[at least R, COLUMNS + B]: see `pack`."""
    packed: torch.Tensor
    """The same on the device."""
    table: Columns
    """The request table."""
    guessed: GuessedRows | None = None
    """Of those of the requests that run ahead, which are the last ones; None if none
    does."""
    canvas_rows: torch.Tensor | None = None
    """[n] int32: rows of the forward that are of the active blocks; None in engines
    without soft inputs. Of requests that run ahead all their rows are among them: only
    the device knows which are."""

    @property
    def num_rows(self) -> int:
        """n: rows of logits that are read for the group, those of branches aside."""
        return len(self.row_request_np)

    @property
    def row_slots_np(self) -> np.ndarray:
        """[n]: state slot of each row's request."""
        slots: np.ndarray = self.slots_np[self.row_request_np]
        return slots

    @property
    def valid_np(self) -> np.ndarray:
        """[R, B] bool: as `Blocks.valid`."""
        valid: np.ndarray = self.row_at_np > NOT_VALID
        return valid

    @cached_property
    def blocks(self) -> Blocks:
        """The blocks, without any that stand for nothing.

        Read it before the step moves on to the next block.
        """
        packed = self.packed[: len(self.slots_np)]
        return Blocks.unpacked(packed, self.table)

    @cached_property
    def row_request(self) -> torch.Tensor:
        """[n] int64: `row_request_np` on the device."""
        return upload(self.packed.device, self.row_request_np)[0]

    @cached_property
    def row_places(self) -> torch.Tensor:
        """[n] int64: where each row belongs in a flattened [R, B] tensor."""
        places = self.row_request_np * self.width + self.row_offset_np
        return upload(self.packed.device, places)[0]


def pack(
    columns: dict[int, np.ndarray], row_at_np: np.ndarray, dummy_slot: int, dummy: int
) -> np.ndarray:
    """A group's blocks as integers, one request a row.

    Two rows at least, so that one compiled step serves any number of requests: a graph
    made for two or more does not serve one.

    Args:
        columns: [R] each, by its number: `SLOT` and so on; what is left out is 0.
        row_at_np: [R, B].
        dummy_slot: the slot of a row that stands for nothing.
        dummy: its row of the reply.

    Returns:
        [R or 2, COLUMNS + B] int32.
    """
    count, width = row_at_np.shape
    packed = np.zeros((max(count, 2), COLUMNS + width), dtype=np.int32)
    for column, values in columns.items():
        packed[:count, column] = values
    packed[:count, COLUMNS:] = row_at_np
    packed[count:, SLOT], packed[count:, BATCH_ROW] = dummy_slot, dummy
    packed[count:, COLUMNS:] = NOT_VALID
    return packed


def upload(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """The arrays as int64 tensors on a device, in one transfer that waits for nothing.

    Args:
        arrays: of integers or booleans, any shapes.
    """
    return _sent(device, arrays, np.int64)


def upload_int32(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """As `upload`, as int32 tensors; each begins at a multiple of 16 bytes."""
    return _sent(device, arrays, np.int32)


def _sent(
    device: torch.device, arrays: tuple[np.ndarray, ...], dtype: type
) -> list[torch.Tensor]:
    room = 16 // np.dtype(dtype).itemsize
    firsts = np.cumsum([0, *(-(-array.size // room) * room for array in arrays)])
    packed = np.empty(firsts[-1], dtype=dtype)
    for first, array in zip(firsts, arrays, strict=False):
        packed[first : first + array.size] = array.ravel()
    tensor = torch.from_numpy(packed)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    tensor = tensor.to(device, non_blocking=True)
    return [
        tensor[first : first + array.size].view(array.shape)
        for first, array in zip(firsts, arrays, strict=False)
    ]
