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

Branches are made of what is to spare, host-known to scheduler and worker: rows of the
forward and free pages that no other request wants. A request of a strategy that
`needs_branches` has as many as fit for certain (`most_branches`), in every step but a
block's first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from vllm_dlm.model_executor.planning.block_rows import (
    COLUMNS,
    NOT_READ,
    BlockRows,
    upload,
)
from vllm_dlm.model_executor.planning.segments import Segments, ragged

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig


def page_size_of(kv_cache_config: KVCacheConfig) -> int:
    """Tokens in a KV page; requests with branches have one kind of pages."""
    return int(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)


class Pages(NamedTuple):
    """Pages of a request's rows [start, end), counted in its block table."""

    first: Any
    end: Any
    """[first, end): the pages that the rows touch."""
    scratch: Any
    """The first scratch page: one past the last page that the rows see."""

    @classmethod
    def of(cls, start: Any, end: Any, seen: Any, page_size: int) -> Pages:
        """The pages of some rows: of numbers, or of arrays of them.

        Args:
            start, end: the rows, [start, end).
            seen: one past the last key that they see, at least `end`.
        """
        return cls(start // page_size, -(-end // page_size), -(-seen // page_size))

    @property
    def count(self) -> Any:
        """How many pages the rows touch: each branch needs as many scratch pages."""
        return self.end - self.first

    def with_branches(self, branches: int) -> int:
        """Pages of a request with this many branches, number 0 included."""
        return int(self.scratch + (branches - 1) * self.count)

    def offset(self, branch: Any) -> Any:
        """By how much a branch's pages, from number 1 on, lie further on."""
        return self.scratch - self.first + (branch - 1) * self.count


def copies_of_pages(
    ids: list[int], branches: int, start: int, end: int, seen: int, page_size: int
) -> list[tuple[int, int]]:
    """Pages to copy, from and to, before a forward: those that hold more than its rows.

    Args:
        ids: of the request's pages.
        branches: of the request, number 0 included.
        start, end, seen: as in `Pages.of`.
    """
    pages = Pages.of(start, end, seen, page_size)
    shared = set()
    if start % page_size:
        shared.add(pages.first)
    if end % page_size and seen > end:
        shared.add(pages.end - 1)
    return [
        (ids[page], ids[page + pages.offset(branch)])
        for branch in range(1, branches)
        for page in sorted(shared)
    ]


class Wish(NamedTuple):
    """What one request would do with room for drafts."""

    branches: int
    """Branches that the request can use; 1 without drafts."""
    held: int
    """Pages that the request has."""
    start: int
    """First row of each branch."""
    end: int
    """One past the last row of each branch."""
    seen: int
    """One past the last key that these rows see."""
    least: int = 1
    """Branches without which the request does not go on."""


def most_branches(
    asked: int,
    *,
    length: int,
    end: int,
    from_start: bool,
    rows: int,
    longest: int,
    page_size: int,
) -> int:
    """Branches that a request can have in every step, if nobody else is there.

    There is room for one more then, which fills up a CUDA graph (`scheduler.py`).

    Args:
        asked: what its strategy would evaluate.
        length: the most rows of a branch.
        end: one past the request's last position.
        from_start: the rows of a branch begin with position 0, not anywhere in a page.
        rows: the most that a forward may have.
        longest: the most pages that a request may have.
        page_size: tokens in a page.
    """
    begin = 0 if from_start else page_size - 1
    pages = -(-(begin + length) // page_size)
    room = longest - -(-end // page_size)
    return max(min(asked, rows // length - 1, room // pages), 1)


def share_out(
    wishes: Sequence[Wish], *, rows: int, pages: int, longest: int, page_size: int
) -> list[int]:
    """Give every request what it needs, then hand out spare rows and pages in order.

    Args:
        wishes: of the requests, in their order.
        rows: the most that a forward may have.
        pages: how many are free.
        longest: the most pages that a request may have.
        page_size: tokens in a page.

    Returns:
        Branches of each request.
    """
    spans = [Pages.of(wish.start, wish.end, wish.seen, page_size) for wish in wishes]
    held = [
        max(wish.held, span.with_branches(wish.least))
        for wish, span in zip(wishes, spans, strict=True)
    ]
    rows -= sum(wish.least * (wish.end - wish.start) for wish in wishes)
    pages -= sum(held) - sum(wish.held for wish in wishes)
    shares = []
    for wish, span, has in zip(wishes, spans, held, strict=True):
        length = wish.end - wish.start
        room = min(has + pages, longest) - span.scratch
        spare = wish.least + rows // length
        share = max(min(wish.branches, spare, 1 + room // span.count), wish.least)
        rows -= (share - wish.least) * length
        pages -= max(span.with_branches(share) - has, 0)
        shares.append(share)
    return shares


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
