# SPDX-License-Identifier: Apache-2.0
"""Branches: canvases that a strategy has drafted, evaluated beside the canvas itself.

A decision may name draft tokens, ranked (`Decision.draft_tokens`). The request's next
forward then has its rows several times over, one behind the other: branch 0 is the
canvas, branch j has the drafts of rank below j, or of rank -j, in place of masks. A
branch sees itself, and the keys on both sides of its rows that branch 0 sees. Its own
keys and values go to scratch pages of the request, behind all that its rows see; pages
of 16, a block of 32 from position 40 on:

    the request's pages      0   1   2   3   4   5   6   7   8   9  10
    branch 0 sees            0   1   2   3   4                          as ever
    branch 1 sees            0   1           5   6   7                  for 2, 3, 4
    branch 2 sees            0   1                       8   9  10      for 2, 3, 4

Page 2 also holds eight positions of finished text: it is copied to pages 5 and 8
before the forward. With full attention and the cache policy `dual` a block also sees
the canvas to its right, whose keys stay: scratch pages begin where the canvas ends, and
page 4, which holds eight positions of that canvas, is copied to pages 7 and 10 as well.
Scratch pages are the request's own, never published for prefix caching, and hold text
later on, when the request has come that far.

How many branches a forward has: `branch_pages.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_dlm.model_executor.planning.block_rows import (
    COLUMNS,
    NOT_READ,
    BlockRows,
    upload,
)
from vllm_dlm.model_executor.planning.branch_pages import Pages
from vllm_dlm.model_executor.planning.segments import Segments, ragged

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class BranchPlan:
    """A forward's rows that belong to branches from number 1 on; E such branches.

    Tensors are on the engine's device; names of arrays on the host end in `_np`.
    """

    row_branch: torch.Tensor
    """[M] int64: the branch of each row of the forward; 0 for the canvases' own."""
    setback: torch.Tensor
    """[M] int64: how far vLLM, which counts on, has put each row's position."""
    rows_np: np.ndarray
    """[n]: rows of branches."""
    row_request_np: np.ndarray
    """[n]: request of each of these rows in vLLM's batch."""
    row_page_np: np.ndarray
    """[n]: page for its key and value, counted in the request's block table."""
    row_offset_np: np.ndarray
    """[n]: place in that page."""
    segments_np: np.ndarray
    """[s]: segments of branches."""
    pages: Pages
    """Of [s] arrays: `first` to `end` are those that scratch pages stand for."""
    scratch_np: np.ndarray
    """[s]: by how much these lie further on in the block table."""

    def place_keys(
        self,
        slot_mapping: torch.Tensor,
        block_table: torch.Tensor,
        page_size: int,
    ) -> None:
        """Send the branches' keys and values to their scratch pages.

        Args:
            slot_mapping: [at least M] int64, changed in place.
            block_table: [requests of the batch, pages] int32.
        """

        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(block_table.device, non_blocking=True)

        page = block_table[on_device(self.row_request_np), on_device(self.row_page_np)]
        slots = page.long() * page_size + on_device(self.row_offset_np)
        slot_mapping[on_device(self.rows_np)] = slots

    def swap_pages(self, block_table: torch.Tensor) -> None:
        """Let the segments of branches see their scratch pages.

        Args:
            block_table: [S, pages] int32, changed in place.
        """

        def column(array: np.ndarray) -> torch.Tensor:
            there = torch.from_numpy(array).to(block_table.device, non_blocking=True)
            return there[:, None]

        segments = column(self.segments_np)[:, 0]
        table = block_table[segments]
        places = torch.arange(table.shape[1], device=table.device).expand_as(table)
        own = (places >= column(self.pages.first)) & (places < column(self.pages.end))
        places = torch.where(own, places + column(self.scratch_np), places)
        block_table[segments] = table.gather(1, places)


@dataclass(frozen=True)
class BranchBlocks:
    """A group's branches from number 1 on: E of them, of R canvases.

    Tensors are on the engine's device; names of arrays on the host end in `_np`.
    """

    parents_np: np.ndarray
    """[E]: the request of the group, 0 to R - 1, that each branch is of."""
    rows: BlockRows
    """The active blocks of the E branches."""
    logits_rows_np: np.ndarray
    """[n]: rows of the forward that go through lm_head for them."""
    parents: torch.Tensor
    """[E] int64: `parents_np` on the device."""
    numbers: torch.Tensor
    """[E] int64: 1 or more."""
    index: torch.Tensor
    """[R, K] int64: branch k of request r, counted from 0 to R - 1 for the canvases
    and on from R for the branches; -1 where it is not evaluated."""
    all_rows_at: torch.Tensor
    """[R + E, B] int64: `Blocks.row_at` of the canvases and of the branches."""

    def by_branch(self, canvas: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        """[R, K, B]: values of the canvases [R, B] and of the branches [E, B]."""
        return torch.cat([canvas, branch])[self.index.clamp(min=0)]


@dataclass(frozen=True)
class GroupRows(BlockRows):
    """A group's canvases, and the branches that are evaluated along."""

    branches: BranchBlocks | None = None
    """None where there are none."""

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
            return self.blocks.row_at[requests, offsets]
        canvas = self.branches.index[requests, branch[requests, offsets]]
        return self.branches.all_rows_at[canvas, offsets]


def plan_branches(
    starts: np.ndarray,
    ends: np.ndarray,
    branches: np.ndarray,
    segments: Segments,
    kv_lens: np.ndarray,
    page_size: int,
    device: torch.device,
) -> BranchPlan:
    """Lay out the branches of a forward.

    Args:
        starts, ends: of each request of the batch, [start, end) of one branch's rows.
        branches: of each request, number 0 included.
        segments: of the forward, those of branches among them.
        kv_lens: [S]: keys that each segment sees.
        page_size: tokens in a KV page.
        device: the engine's.
    """

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    lengths = ends - starts
    seen = np.zeros_like(ends)
    seen[segments.request] = kv_lens
    pages = Pages.of(starts, ends, seen, page_size)
    request, place = ragged(lengths * branches)
    branch = place // lengths[request]
    rows = branch.nonzero()[0]
    row_request = request[rows]
    own_pages = Pages(*(of_request[row_request] for of_request in pages))
    position = starts[row_request] + place[rows] % lengths[row_request]

    place = np.arange(len(segments.request)) - np.searchsorted(
        segments.request, segments.request
    )
    of_request = np.bincount(segments.request, minlength=len(branches))
    number = place // (of_request // branches)[segments.request]
    of_branches = number.nonzero()[0]
    replaced = Pages(*(of[segments.request[of_branches]] for of in pages))
    return BranchPlan(
        row_branch=on_device(branch),
        setback=on_device(branch * lengths[request]),
        rows_np=rows,
        row_request_np=row_request,
        row_page_np=position // page_size + own_pages.offset(branch[rows]),
        row_offset_np=position % page_size,
        segments_np=of_branches,
        pages=replaced,
        scratch_np=replaced.offset(number[of_branches]),
    )


def branch_blocks(
    canvases: BlockRows,
    logits_rows: np.ndarray,
    branches: np.ndarray,
    lengths: np.ndarray,
    first_row: int,
) -> BranchBlocks:
    """The active blocks of a group's branches, and their rows.

    A branch reads the rows that its canvas does: it has no further masks.

    Args:
        canvases: the group's.
        logits_rows: [n]: rows of the forward that go through lm_head for them.
        branches: [R]: of each request of the group, number 0 included.
        lengths: [R]: rows of one branch of each.
        first_row: number of the first row of logits of these branches.
    """
    device = canvases.packed.device
    count, width = len(canvases.slots_np), canvases.width
    parents, numbers = ragged(branches - 1)
    numbers = numbers + 1
    counts = np.bincount(canvases.row_request_np, minlength=count)
    first = np.cumsum(counts) - counts
    block, nth = ragged(counts[parents])
    copied = first[parents[block]] + nth
    offset = canvases.row_offset_np[copied]
    row_at = np.minimum(canvases.row_at_np[parents], NOT_READ)
    row_at[block, offset] = first_row + np.arange(len(block))
    index = np.full((count, int(branches.max(initial=1))), -1)
    index[:, 0] = np.arange(count)
    index[parents, numbers] = count + np.arange(len(parents))
    packed = canvases.packed_np[parents]
    packed[:, COLUMNS:] = row_at
    at, numbers_there, index_there, rows_there, packed_there = upload(
        device,
        parents,
        numbers,
        index,
        np.concatenate([canvases.row_at_np, row_at]),
        packed,
    )
    return BranchBlocks(
        parents_np=parents,
        rows=BlockRows(
            slots_np=canvases.slots_np[parents],
            batch_rows_np=canvases.batch_rows_np[parents],
            width=width,
            row_at_np=row_at,
            first_row=first_row,
            row_request_np=block,
            row_offset_np=offset,
            packed_np=packed,
            packed=packed_there,
            table=canvases.table,
        ),
        logits_rows_np=logits_rows[copied] + (numbers * lengths[parents])[block],
        parents=at,
        numbers=numbers_there,
        index=index_there,
        all_rows_at=rows_there,
    )
