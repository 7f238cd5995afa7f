# SPDX-License-Identifier: Apache-2.0
"""Pages of branches, and how many branches a request's forward has.

Branches are made of what is to spare, host-known to scheduler and worker: rows of the
forward and free pages that no other request wants. A request of a strategy that
`needs_branches` has as many as fit for certain (`most_branches`), in every step but a
block's first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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
