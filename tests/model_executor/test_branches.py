# SPDX-License-Identifier: Apache-2.0
"""Branches laid out by hand: pages, rows, tokens, and who gets any."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_dlm.model_executor.drafts import Drafts
from vllm_dlm.model_executor.planning.block_rows import BlockRows, Cells
from vllm_dlm.model_executor.planning.branches import (
    Pages,
    Wish,
    plan_branches,
    share_out,
)
from vllm_dlm.model_executor.planning.segments import cut_segments
from vllm_dlm.strategies.base import NOT_DRAFTED, Decision

MASK_ID = 99


def active_blocks(slots: list[int], starts: list[int], length: int) -> BlockRows:
    """Whole blocks of one length, whose rows are the first of a forward."""
    count = len(slots)
    return BlockRows(
        slots=torch.tensor(slots),
        slots_np=np.array(slots),
        positions=torch.tensor(starts)[:, None] + torch.arange(length),
        valid=torch.ones(count, length, dtype=torch.bool),
        readable=torch.ones(count, length, dtype=torch.bool),
        logits_rows=torch.arange(count * length),
        row_places=torch.arange(count * length),
        row_at=torch.arange(count * length).view(count, length),
        row_request_np=np.repeat(np.arange(count), length),
        row_offset_np=np.tile(np.arange(length), count),
        row_request=torch.arange(count).repeat_interleave(length),
    )


def test_scratch_pages():
    """The picture in the module: pages of 16, a block of 32 from position 40 on."""
    pages = Pages.of(40, 72, 16)
    assert (pages.first, pages.end, pages.count) == (2, 5, 3)
    assert [pages.with_branches(count) for count in (1, 2, 3)] == [5, 8, 11]
    ids = [100 + page for page in range(11)]
    assert pages.copies(ids, 40, 3, 16) == [(102, 105), (102, 108)]
    assert pages.copies(ids, 40, 1, 16) == []
    # A block that begins with a page shares none with finished text.
    assert Pages.of(48, 80, 16).copies(ids, 48, 3, 16) == []


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

    blocks = active_blocks([7, 5], [4, 8], 4)
    plan = plan_branches(
        starts, ends, branches, segments, np.array([0, 1]), blocks, page_size=8
    )
    assert plan.row_branch.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [0] * 4
    # vLLM counts on: positions 8 to 16 are those of branches.
    assert plan.setback.tolist() == [0] * 4 + [4] * 4 + [8] * 4 + [0] * 4
    assert plan.blocks.slots_np.tolist() == [7, 7]
    assert plan.blocks.positions.tolist() == [[4, 5, 6, 7]] * 2
    assert plan.blocks.logits_rows.tolist() == [*range(4, 12)]
    assert plan.index.tolist() == [[0, 2, 3], [1, -1, -1]]
    assert plan.all_rows_at.tolist() == [
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
    assert plan.by_branch(canvas, branch)[0].tolist() == [[1], [3], [4]]


def test_drafts_are_written_by_rank():
    drafts = Drafts((8, 20), MASK_ID, torch.device("cpu"))
    blocks = active_blocks([7, 5], [4, 8], 4)
    decision = Decision(
        commit=torch.zeros(2, 4, dtype=torch.bool),
        draft_tokens=torch.tensor([[31, 32, 33, 34], [41, MASK_ID, 43, 44]]),
        draft_rank=torch.tensor([[2, NOT_DRAFTED, 0, 1], [0, 1, 2, 3]]),
    )
    masked = torch.tensor([[True] * 4, [True, True, False, True]])
    # 20 positions a slot.
    cells = torch.tensor(
        [7 * 20 + 4 + i for i in range(4)] + [5 * 20 + 8 + i for i in range(4)]
    )
    drafts.keep(decision, masked, Cells(torch.arange(8), cells))
    tokens, rank = drafts.of(blocks)
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
    drafts.forget(7)
    assert (drafts.of(blocks)[1][0] == NOT_DRAFTED).all()
    assert drafts.of(blocks)[1][1, 0] == 0


PLAIN = Wish(1, held=3, start=0, end=40)
"""A request without drafts: 40 rows, 3 pages of 16."""


@pytest.mark.parametrize(
    ("wishes", "rows", "pages", "shares"),
    [
        pytest.param(
            [Wish(4, held=2, start=0, end=32)], 128, 9, [4], id="room for all"
        ),
        pytest.param([Wish(4, held=2, start=0, end=32)], 127, 9, [3], id="few rows"),
        pytest.param([Wish(4, held=2, start=0, end=32)], 128, 5, [3], id="few pages"),
        pytest.param(
            [Wish(4, held=7, start=0, end=32)], 128, 0, [3], id="pages it has"
        ),
        pytest.param(
            [Wish(4, held=6, start=0, end=96)], 512, 99, [2], id="context ends"
        ),
        pytest.param(
            [Wish(4, held=2, start=0, end=32), PLAIN], 128, 9, [2, 1], id="others"
        ),
        pytest.param(
            [Wish(4, held=2, start=0, end=32), Wish(1, held=0, start=0, end=40)],
            128,
            5,
            [2, 1],
            id="others need pages",
        ),
        pytest.param(
            [Wish(2, held=2, start=0, end=32)] * 3,
            160,
            9,
            [2, 2, 1],
            id="in their order",
        ),
        pytest.param(
            [Wish(4, held=2, start=0, end=32), PLAIN], 48, 0, [1, 1], id="no room"
        ),
    ],
)
def test_who_gets_branches(wishes, rows, pages, shares):
    """Requests of at most 12 pages."""
    got = share_out(wishes, rows=rows, pages=pages, longest=12, page_size=16)
    assert got == shares
