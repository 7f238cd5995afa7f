# SPDX-License-Identifier: Apache-2.0
"""Staging: what new requests bring to the request table, in one transfer.

Between two steps vLLM's runner admits all new requests, one after the other, and then
says once that all are there. So an admission only fills a row of an array in host
memory, and `Staging.write` then brings all rows to the tensors of the table, with one
operation for each tensor, however many rows there are. These operations read the array
where it lies: also on a GPU, which sees the host's pinned memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

WORDS_OF_INDEX = 2


class Part(NamedTuple):
    """Some words of each staged row: a row of one tensor."""

    tensor: torch.Tensor
    words: slice
    staged: np.ndarray
    """[capacity, ...]: the same words on the host, in the tensor's type."""


class Staging:
    """Rows of a table's tensors, until they are written; see the module docstring.

    A staged row is int32 words: the row of the table (int64), and what each tensor
    shall have there, in the tensor's own type.

    Args:
        tensors: [rows, ...], each of which is contiguous.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        capacity, first, words = len(tensors[0]), WORDS_OF_INDEX, []
        for tensor in tensors:
            # Every part begins where an int64 may.
            size = 2 * -(-tensor[0].nbytes // 8)
            words.append(slice(first, first + size))
            first += size
        self._block = np.zeros((capacity, first), dtype=np.int32)
        self._send = sender(tensors[0].device, first)
        self._index = self._block[:, :WORDS_OF_INDEX].view(np.int64)[:, 0]
        self._parts = [
            Part(tensor, where, _as(self._block[:, where], tensor))
            for tensor, where in zip(tensors, words, strict=True)
        ]
        self._place: dict[int, int] = {}
        """Row of the table -> its place in the block."""

    @property
    def arrays(self) -> list[np.ndarray]:
        """For each tensor [places, ...]: what it shall have in staged rows."""
        return [part.staged for part in self._parts]

    def place_of(self, row: int) -> int:
        """The place of a row of the table, which is staged from now on; 0 at first."""
        place = self._place.get(row)
        if place is None:
            place = self._place[row] = len(self._place)
            self._block[place] = 0
            self._index[place] = row
        return place

    def write(self) -> None:
        """Write what was staged to the tensors, and begin anew."""
        if not self._place:
            return
        block = self._send(self._block[: len(self._place)])
        index = block[:, :WORDS_OF_INDEX].view(torch.int64)[:, 0]
        for tensor, words, _ in self._parts:
            rows = block[:, words].view(tensor.dtype)[:, : tensor.shape[1]]
            tensor.index_copy_(0, index, rows)
        self._place.clear()


def _as(words: np.ndarray, tensor: torch.Tensor) -> np.ndarray:
    """Words [n, ...] of int32 as rows of a tensor."""
    dtype = torch.empty(0, dtype=tensor.dtype).numpy().dtype
    return words.view(dtype)[:, : tensor.shape[1]]


def sender(device: torch.device, words: int) -> Callable[[np.ndarray], torch.Tensor]:
    """What makes rows [n, words] of int32 on the host readable for a device."""
    if device.type == "cpu":
        return torch.from_numpy
    from vllm.v1.worker.gpu.buffer_utils import UvaBufferPool

    # Pinned memory: a buffer for each step that may be in flight, as large as the most
    # rows so far. A platform that has none copies, which is one operation more.
    return UvaBufferPool((1, words), torch.int32).copy_to_uva
