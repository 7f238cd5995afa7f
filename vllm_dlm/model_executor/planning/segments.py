# SPDX-License-Identifier: Apache-2.0
"""SegmentPlan: what one forward computes and sees.

vLLM's attention backends know query ranges, key lengths and block tables, nothing of
requests. A forward of a diffusion model is therefore described as a list of segments,
each one row of **non-causal** attention: a query range and how many keys it sees. KV
is written before attention runs, so a segment sees the keys of the whole forward.

    class A, no cache      |prompt ........ canvas ........|   one segment, keys = all
    class A, dual cache            |block|                     keys reach past the query
    class B, first step    |block|block|block|tail+masks|      one segment per block,
    class B, next block                |final|new block|       keys = up to its end
    class B, inner step                      |new block|
    class C                |causal prompt ...|new block|       as B, older rows causal

Segments of one request share its row of the block table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_dlm.config.model import ModelClass

if TYPE_CHECKING:
    from vllm_dlm.model_executor.planning.branches import BranchPlan


@dataclass(frozen=True)
class Segments:
    """Rows of attention of one forward; S segments of a batch, all arrays on the host.

    A request's segments follow each other, so that the batch's rows keep their order.
    """

    request: np.ndarray
    """[S] int64: index in the batch of the request that a segment belongs to."""
    query_start_loc: np.ndarray
    """[S + 1] int32: where each segment's query rows begin in the batch."""
    kv_lens: np.ndarray
    """[S] int32: keys each segment attends to, counted from position 0."""
    is_last: np.ndarray
    """[S] bool: the last one of its request, or of a branch of it."""

    def repeated(self, counts: np.ndarray) -> Segments:
        """The same with `counts` [S] of each, one behind the other: branches."""
        lengths = np.repeat(np.diff(self.query_start_loc), counts)
        return Segments(
            np.repeat(self.request, counts),
            _starts_of(lengths),
            np.repeat(self.kv_lens, counts),
            np.repeat(self.is_last, counts),
        )


def cut_segments(
    model_class: ModelClass,
    starts: np.ndarray,
    ends: np.ndarray,
    block_lengths: np.ndarray,
    origins: np.ndarray,
    first_blocks: np.ndarray,
) -> Segments:
    """Cut each request's rows [start, end) into segments.

    Args:
        starts, ends: [R] absolute positions of the rows to compute.
        block_lengths: [R] B of each request.
        origins: [R] positions from which blocks are counted.
        first_blocks: [R] start of the block that was active at admission.
    """
    request = np.arange(len(starts))
    lengths = ends - starts
    if model_class == "A":
        one = np.ones(len(starts), dtype=bool)
        return Segments(request, _starts_of(lengths), ends.astype(np.int32), one)
    first = (starts - origins) // block_lengths
    if model_class == "C":
        # One causal segment holds all that was known at admission.
        first = np.maximum(first, (first_blocks - origins) // block_lengths - 1)
    counts = np.maximum(-((origins - ends) // block_lengths) - first, 1)
    request, nth = ragged(counts)
    bounds = origins[request] + (first[request] + nth + 1) * block_lengths[request]
    segment_ends = np.minimum(bounds, ends[request])
    segment_starts = np.where(
        nth == 0, starts[request], bounds - block_lengths[request]
    )
    return Segments(
        request,
        _starts_of(segment_ends - segment_starts),
        segment_ends.astype(np.int32),
        np.append(request[1:] != request[:-1], True),
    )


def ragged(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Owner, and place in the owner's row, of each entry of rows of these lengths."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    first = np.cumsum(lengths) - lengths
    return owner, np.arange(len(owner)) - first[owner]


def _starts_of(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


@dataclass(frozen=True)
class BlockRows:
    """R active blocks, and the rows of a forward whose logits are read for them.

    Blocks are of different lengths, and of each only some positions are read. Tensors
    are on the engine's device, arrays on the host.
    """

    slots: torch.Tensor
    """[R] int64: state slot of each block's request."""
    slots_np: np.ndarray
    """The same on the host."""
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
    row_request: np.ndarray
    """[N]: the request that each row belongs to, counted from 0 to R - 1."""
    row_offset: np.ndarray
    """[N]: the row's place in its block."""
    row_requests: torch.Tensor
    """[N] int64: `row_request` on the device."""

    @property
    def row_at_np(self) -> np.ndarray:
        """[R, B] int64: `row_at` on the host."""
        rows = np.full(self.positions.shape, -1)
        rows[self.row_request, self.row_offset] = np.arange(len(self.row_request))
        return rows

    @property
    def row_slots(self) -> np.ndarray:
        """[N]: state slot of each row's request."""
        slots: np.ndarray = self.slots_np[self.row_request]
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


@dataclass(frozen=True)
class SegmentPlan(BlockRows):
    """One forward: its segments, and the active blocks that it decides.

    Of the batch's requests, R decide in this forward; the others compute a part of
    their prompt.
    """

    segments: Segments
    kv_lens: torch.Tensor
    """[S] int32: keys each segment attends to; those of class A may reach beyond the
    rows of this forward."""
    causal: torch.Tensor | None
    """[S] int32: 1 where a position sees none to its right, as in class C's finished
    text; None where there is no such segment."""
    batch_rows: np.ndarray
    """[R]: index of each deciding request in vLLM's batch."""
    ends: torch.Tensor
    """[R] int64: one past the last position computed for each."""
    canvas_end: torch.Tensor
    """[R] int64: one past each canvas' last position."""
    cells: Cells
    """Where the canvases' positions are kept."""
    seeds: torch.Tensor
    """[R] bool: the rows end before the block, and predict its first position alone."""
    rows_ends: torch.Tensor
    """[R] int64: `ends`, and the rows of branches counted on from there."""
    branches: BranchPlan | None
    """Drafts that are evaluated along; None where there are none."""

    @property
    def has_row(self) -> torch.Tensor:
        """[R, B] bool: positions of the canvases whose logits are read."""
        return self.row_at >= 0

    def rows_at(
        self,
        requests: torch.Tensor,
        offsets: torch.Tensor,
        branch: torch.Tensor | None,
    ) -> torch.Tensor:
        """[n] int64: rows of logits of some positions, those of branches included.

        Args:
            requests: [n] int64, 0 to R - 1.
            offsets: [n] int64, places in their blocks.
            branch: [R, B] int64, of each position; None for 0.
        """
        if self.branches is None or branch is None:
            return self.row_at[requests, offsets]
        canvas = self.branches.index[requests, branch[requests, offsets]]
        return self.branches.all_rows_at[canvas, offsets]


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
