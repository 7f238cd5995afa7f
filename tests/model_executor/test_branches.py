# SPDX-License-Identifier: Apache-2.0
"""Branches laid out by hand: pages, rows, tokens, and who gets any."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_dlm.model_executor.columns import Columns
from vllm_dlm.model_executor.drafts import Drafts
from vllm_dlm.model_executor.planning.block_rows import (
    CANVAS_END,
    SLOT,
    BlockRows,
    pack,
)
from vllm_dlm.model_executor.planning.branch_pages import (
    Pages,
    Wish,
    copies_of_pages,
    most_branches,
    share_out,
)
from vllm_dlm.model_executor.planning.branches import branch_blocks, plan_branches
from vllm_dlm.model_executor.planning.segments import cut_segments
from vllm_dlm.strategies.base import NOT_DRAFTED, Decision

MASK_ID = 99


def active_blocks(slots: list[int], starts: list[int], length: int) -> BlockRows:
    """Whole blocks of one length, whose rows are the first of a forward."""
    count = len(slots)
    row_at = np.arange(count * length).reshape(count, length)
    table = Columns(9, 20, torch.device("cpu"))
    table.block_start[slots] = torch.tensor(starts)
    columns = {SLOT: np.array(slots), CANVAS_END: np.array(starts) + length}
    packed = pack(columns, row_at, dummy_slot=9, dummy=count)
    return BlockRows(
        slots_np=np.array(slots),
        batch_rows_np=np.arange(count),
        width=length,
        row_at_np=row_at,
        first_row=0,
        row_request_np=np.repeat(np.arange(count), length),
        row_offset_np=np.tile(np.arange(length), count),
        packed_np=packed,
        packed=torch.from_numpy(packed),
        table=table,
    )


def test_scratch_pages():
    """The picture in the module: pages of 16, a block of 32 from position 40 on."""
    pages = Pages.of(40, 72, 72, 16)
    assert (pages.first, pages.end, pages.count) == (2, 5, 3)
    assert [pages.with_branches(count) for count in (1, 2, 3)] == [5, 8, 11]
    ids = [100 + page for page in range(11)]
    assert copies_of_pages(ids, 3, 40, 72, 72, 16) == [(102, 105), (102, 108)]
    assert copies_of_pages(ids, 1, 40, 72, 72, 16) == []
    # A block that begins with a page shares none with finished text.
    assert copies_of_pages(ids, 3, 48, 80, 80, 16) == []


def test_scratch_pages_behind_a_canvas():
    """The same block, with a canvas to position 100 whose keys it sees."""
    pages = Pages.of(40, 72, 100, 16)
    assert (pages.first, pages.end, pages.count, pages.scratch) == (2, 5, 3, 7)
    assert [pages.with_branches(count) for count in (1, 2, 3)] == [7, 10, 13]
    assert [pages.offset(branch) for branch in (1, 2)] == [5, 8]
    ids = [100 + page for page in range(13)]
    # The pages at both ends of the block hold more than the block.
    assert copies_of_pages(ids, 3, 40, 72, 100, 16) == [
        *((102, 107), (104, 109)),
        *((102, 110), (104, 112)),
    ]
    # Where these are one page, it is copied once.
    assert copies_of_pages(ids, 2, 40, 46, 100, 16) == [(102, 107)]
    assert copies_of_pages(ids, 2, 48, 64, 100, 16) == []


def test_a_forward_with_branches():
    """Two requests of four rows: one has three branches, the other its canvas."""
    starts, ends = np.array([4, 8]), np.array([8, 12])
    branches = np.array([3, 1])
    segments = cut_segments(
        "block", starts, ends, np.array([4, 4]), np.zeros(2, int), np.zeros(2, int)
    ).repeated(branches)
    assert segments.request.tolist() == [0, 0, 0, 1]
    assert segments.query_start_loc.tolist() == [0, 4, 8, 12, 16]
    assert segments.kv_lens.tolist() == [8, 8, 8, 12]
    assert segments.is_last.all()

    device = torch.device("cpu")
    kv_lens = segments.kv_lens
    plan = plan_branches(starts, ends, branches, segments, kv_lens, 8, device)
    assert plan.row_branch.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [0] * 4
    # vLLM counts on: positions 8 to 16 are those of branches.
    assert plan.setback.tolist() == [0] * 4 + [4] * 4 + [8] * 4 + [0] * 4

    canvases = active_blocks([7, 5], [4, 8], 4)
    logits_rows = np.array([*range(4), *range(12, 16)])
    group = branch_blocks(canvases, logits_rows, branches, ends - starts, first_row=8)
    assert group.rows.slots_np.tolist() == [7, 7]
    assert group.rows.blocks.positions.tolist() == [[4, 5, 6, 7]] * 2
    assert group.logits_rows_np.tolist() == [*range(4, 12)]
    assert group.index.tolist() == [[0, 2, 3], [1, -1, -1]]
    assert group.all_rows_at.tolist() == [
        [*range(0, 4)],
        [*range(4, 8)],
        [*range(8, 12)],
        [*range(12, 16)],
    ]

    tables = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]], dtype=torch.int32)
    slot_mapping = torch.zeros(16, dtype=torch.int64)
    plan.place_keys(slot_mapping, tables, 8)
    assert slot_mapping.tolist() == [
        *[0] * 4,
        *range(11 * 8 + 4, 11 * 8 + 8),
        *range(12 * 8 + 4, 12 * 8 + 8),
        *[0] * 4,
    ]
    seen = tables[torch.from_numpy(segments.request)]
    plan.swap_pages(seen)
    assert seen[:, 0].tolist() == [10, 11, 12, 20]
    assert torch.equal(seen[3], tables[1])

    canvas, branch = torch.tensor([[1], [2]]), torch.tensor([[3], [4]])
    assert group.by_branch(canvas, branch)[0].tolist() == [[1], [3], [4]]


def test_branches_see_the_canvas_behind_their_block():
    """A block of four rows, pages of 4, and a canvas that ends six positions on."""
    starts, ends, branches = np.array([6]), np.array([10]), np.array([2])
    four, zero = np.array([4]), np.array([0])
    segments = cut_segments("full", starts, ends, four, zero, zero).repeated(branches)
    plan = plan_branches(
        starts, ends, branches, segments, np.array([16, 16]), 4, torch.device("cpu")
    )
    tables = torch.arange(10, 16, dtype=torch.int32)[None]
    slot_mapping = torch.zeros(8, dtype=torch.int64)
    plan.place_keys(slot_mapping, tables, 4)
    # Pages 1 and 2 of the request, in its pages 4 and 5.
    assert slot_mapping.tolist() == [0] * 4 + [58, 59, 60, 61]
    seen = tables[[0, 0]]
    plan.swap_pages(seen)
    assert seen.tolist() == [[10, 11, 12, 13, 14, 15], [10, 14, 15, 13, 14, 15]]


def test_drafts_are_written_by_rank():
    drafts = Drafts(torch.Size((10, 20)), MASK_ID, torch.device("cpu"))
    blocks = active_blocks([7, 5], [4, 8], 4)
    decision = Decision(
        commit=torch.zeros(2, 4, dtype=torch.bool),
        draft_tokens=torch.tensor([[31, 32, 33, 34], [41, MASK_ID, 43, 44]]),
        draft_rank=torch.tensor([[2, NOT_DRAFTED, 0, 1], [0, 1, 2, 3]]),
    )
    masked = torch.tensor([[True] * 4, [True, True, False, True]])
    drafts.keep(decision, masked, blocks.blocks)
    tokens, rank = drafts.of(blocks.blocks)
    assert tokens[0].tolist() == [31, 32, 33, 34]
    assert rank.tolist() == [
        [2, NOT_DRAFTED, 0, 1],
        # Neither a predicted mask nor what is decided is drafted.
        [0, NOT_DRAFTED, NOT_DRAFTED, 3],
    ]
    positions = torch.arange(3, 9)
    slots = torch.full_like(positions, 7)
    own = torch.full_like(positions, 1, dtype=torch.int32)
    for branch, wanted in (
        (0, [1, 1, 1, 1, 1, 1]),
        (1, [1, 1, 1, 33, 1, 1]),
        (3, [1, 31, 1, 33, 34, 1]),
    ):
        number = torch.full_like(positions, branch)
        assert drafts.written(own, slots, positions, number).tolist() == wanted
    alone = torch.tensor([[-2, NOT_DRAFTED, -1, 0]] * 2)
    decision.draft_rank = alone
    drafts.keep(decision, masked, blocks.blocks)
    for branch, wanted in (
        (0, [1, 1, 1, 1, 1, 1]),
        (1, [1, 1, 1, 33, 34, 1]),
        (2, [1, 31, 1, 1, 34, 1]),
    ):
        number = torch.full_like(positions, branch)
        assert drafts.written(own, slots, positions, number).tolist() == wanted
    drafts.keep(decision, masked, blocks.blocks)
    drafts.forget(7)
    assert (drafts.of(blocks.blocks)[1][0] == NOT_DRAFTED).all()
    assert drafts.of(blocks.blocks)[1][1, 0] == -2


def wish(
    branches: int, held: int, start: int, end: int, seen: int = 0, least: int = 1
) -> Wish:
    return Wish(branches, held, start, end, max(seen, end), least)


PLAIN = wish(1, 3, 0, 40)
"""A request without drafts: 40 rows, 3 pages of 16."""


@pytest.mark.parametrize(
    ("wishes", "rows", "pages", "shares"),
    [
        pytest.param([wish(4, 2, 0, 32)], 128, 9, [4], id="room for all"),
        pytest.param([wish(4, 2, 0, 32)], 127, 9, [3], id="few rows"),
        pytest.param([wish(4, 2, 0, 32)], 128, 5, [3], id="few pages"),
        pytest.param([wish(4, 7, 0, 32)], 128, 0, [3], id="pages it has"),
        pytest.param([wish(4, 6, 0, 96)], 512, 99, [2], id="context ends"),
        pytest.param(
            [wish(4, 2, 0, 32), PLAIN],
            128,
            9,
            [2, 1],
            id="others",
        ),
        pytest.param(
            [
                wish(4, 2, 0, 32),
                wish(1, 0, 0, 40),
            ],
            128,
            5,
            [2, 1],
            id="others need pages",
        ),
        pytest.param([wish(4, 6, 32, 48, 96)], 64, 2, [3], id="canvas stays"),
        pytest.param(
            [wish(2, 2, 0, 32)] * 3,
            160,
            9,
            [2, 2, 1],
            id="in their order",
        ),
        pytest.param(
            [wish(4, 2, 0, 32), PLAIN],
            48,
            0,
            [1, 1],
            id="no room",
        ),
        pytest.param(
            [
                wish(4, 2, 0, 32),
                wish(3, 2, 0, 32, least=3),
            ],
            160,
            7,
            [2, 3],
            id="what another needs",
        ),
        pytest.param(
            [wish(3, 2, 0, 32, least=3), PLAIN],
            48,
            0,
            [3, 1],
            id="needs what is not there, and waits",
        ),
    ],
)
def test_who_gets_branches(wishes, rows, pages, shares):
    """Requests of at most 12 pages."""
    got = share_out(wishes, rows=rows, pages=pages, longest=12, page_size=16)
    assert got == shares


@pytest.mark.parametrize(
    ("asked", "end", "rows", "longest", "wanted"),
    [
        (3, 40, 512, 99, 3),
        # One more must fit: 4 times 32 rows.
        (9, 40, 128, 99, 3),
        # Behind the text's 3 pages; a branch may touch 3, wherever it begins.
        (9, 40, 512, 12, 3),
        (9, 40, 512, 5, 1),
        (9, 40, 32, 99, 1),
    ],
)
def test_branches_that_always_fit(asked, end, rows, longest, wanted):
    got = most_branches(
        asked,
        length=32,
        end=end,
        from_start=False,
        rows=rows,
        longest=longest,
        page_size=16,
    )
    assert got == wanted


def test_branches_of_whole_canvases_begin_with_a_page():
    """Of 12 pages the text has 3, as many as each branch."""
    sizes = {"rows": 512, "longest": 12, "page_size": 16}
    assert most_branches(9, length=40, end=40, from_start=True, **sizes) == 3
    assert most_branches(9, length=40, end=40, from_start=False, **sizes) == 2
