# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reference.place_rules import multi_block
from reference.rules import View as RowView
from reference.rules import top_k
from reference.views import CPU, make_view, select

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import NOT_DRAFTED, Branches, View, numeric_fields
from vllm_dlm.strategies.lopa import Lopa, LopaParams
from vllm_dlm.testing import check_strategy

MASK = -1


def lopa(width: int = 4, **params: Any) -> Lopa:
    return Lopa(LopaParams(**params), width, CPU)


def tried(
    canvas: list[int], drafts: list[tuple[int, int]], confidences: list[list[float]]
) -> View:
    """A canvas, and one with each draft, as a model finds them; it predicts 10 + i."""
    width, count = len(canvas), len(confidences)
    masked = torch.tensor([[[token == MASK for token in canvas]] * count])
    rank, tokens = [NOT_DRAFTED] * width, [0] * width
    for branch, (place, token) in enumerate(drafts, start=1):
        rank[place], tokens[place] = -branch, token
        if branch < count:
            masked[0, branch, place] = False
    confidence = torch.tensor([confidences])
    candidate = (10 + torch.arange(width)).expand(1, count, width)
    branches = Branches(
        torch.tensor([tokens]), torch.tensor([rank]), masked, candidate, confidence
    )
    return make_view(confidence[:, 0], masked[:, 0], branches=branches)


def made(strategy: Lopa, view: View) -> tuple[dict[int, int], list[tuple[int, int]]]:
    """What a step writes, and what it drafts, branch by branch."""
    decision = select(strategy, view)
    assert decision.new_tokens is not None
    assert decision.draft_rank is not None and decision.draft_tokens is not None
    places = decision.commit[0].nonzero()[:, 0].tolist()
    writes = {i: int(decision.new_tokens[0, i]) for i in places}
    rank = decision.draft_rank[0].tolist()
    order = sorted((-r, i) for i, r in enumerate(rank) if r != NOT_DRAFTED)
    assert [r for r, _ in order] == list(range(1, len(order) + 1))
    return writes, [(i, int(decision.draft_tokens[0, i])) for _, i in order]


# Nothing is sure of a block of 4; then two drafts are tried beside the anchor.
ANCHOR = [0.6, 0.5, 0.4, 0.3]


def test_worked_block():
    strategy = lopa(branches=3)
    first = tried([MASK] * 4, [], [ANCHOR])
    # The best is written; the next two are drafts.
    assert made(strategy, first) == ({0: 10}, [(1, 11), (2, 12)])
    beside = [
        [0.0, 0.5, 0.6, 0.4],  # mean of its masks 1, 2, 3: .5
        [0.0, 0.0, 0.6, 0.5],  # of 2, 3: .55
        [0.0, 0.95, 0.0, 0.4],  # of 1, 3: .675
    ]
    second = tried([0, MASK, MASK, MASK], [(1, 21), (2, 22)], beside)
    # Branch 2 is kept: its draft is written, and what is sure on it.
    assert made(strategy, second) == ({1: 11, 2: 22}, [(3, 13)])
    decision = select(strategy, second)
    assert decision.branch is not None and decision.branch[0].tolist()[1:3] == [2, 0]
    # Without the branches the anchor goes on alone.
    alone = tried([0, MASK, MASK, MASK], [(1, 21), (2, 22)], beside[:1])
    assert made(strategy, alone) == ({2: 12}, [(1, 11), (3, 13)])


def test_the_anchor_wins_ties_and_a_full_canvas_has_nothing_ahead():
    beside = [[0.0, 0.5, 0.5, 0.5], [0.0, 0.0, 0.5, 0.5]]
    view = tried([0, MASK, MASK, MASK], [(1, 21)], beside)
    assert made(lopa(branches=2), view)[0] == {1: 11}
    view = tried([0, 0, 0, MASK], [(3, 23)], [[0.0, 0.0, 0.0, 0.2], [0.0] * 4])
    assert made(lopa(branches=2), view) == ({3: 13}, [])


def test_masks_of_blocks_that_are_not_open_do_not_count():
    """Of blocks of two the second is open once half of the first is written."""
    beside = [[0.5, 0.4, 0.9, 0.9], [0.0, 0.5, 0.1, 0.2]]
    view = tried([MASK] * 4, [(0, 20)], beside)
    row = {"branches": 2, "block": 2, "open_at": 0.5, "threshold": 0.95}
    # Branch 0: (.5 + .4) / 2; branch 1, where block 1 is open: (.5 + .1 + .2) / 3.
    assert made(lopa(**row), view) == ({0: 10}, [(1, 11)])
    beside[1] = [0.0, 0.5, 0.6, 0.7]
    view = tried([MASK] * 4, [(0, 20)], beside)
    assert made(lopa(**row), view) == ({0: 20, 1: 11}, [(3, 13)])


@given(
    seed=st.integers(0, 2**20),
    count=st.integers(1, 5),
    threshold=st.floats(0.0, 1.0),
    block=st.integers(1, 9),
    open_at=st.floats(0.01, 1.0),
    due_at=st.floats(0.0, 1.0),
)
def test_agrees_with_plain_loops(seed, count, threshold, block, open_at, due_at):
    generator = torch.Generator().manual_seed(seed)
    width = 8
    canvas = [
        MASK if bit else 0
        for bit in torch.randint(2, (width,), generator=generator).tolist()
    ]
    masks = [i for i, token in enumerate(canvas) if token == MASK]
    drafts = [(place, 20 + place) for place in masks[: count - 1]]
    confidences = torch.rand(count, width, generator=generator).tolist()
    view = tried(canvas, drafts, confidences)
    params = {"block": block, "open_at": open_at, "due_at": due_at}
    strategy = lopa(width, branches=count, threshold=threshold, **params)
    if not masks:
        assert made(strategy, view) == ({}, [])
        return
    rule = multi_block(threshold=threshold, by="confidence", push="each", **params)
    found = []
    for branch, confidence in enumerate(confidences):
        draft = drafts[branch - 1 : branch] if branch else []
        row = [i for i in masks if i not in [place for place, _ in draft]]
        decided = torch.tensor([i not in row for i in range(width)])
        scores = torch.tensor(confidence)
        seen = RowView(~decided, scores, scores, scores, scores, 0, 0, 1)
        seen.decided = decided
        # What would be written if all were sure is what is open.
        everything = multi_block(threshold=-1.0, by="confidence", push="each", **params)
        ahead = everything.step(seen).commit
        if ahead:
            mean = sum(scores[i] for i in ahead) / len(ahead)
            found.append((float(mean), -branch, draft, scores, ahead, rule.step(seen)))
    *_, draft, scores, ahead, step = max(found, key=lambda one: one[:2])
    close = sorted(one[0] for one in found)[-2:]
    if len(close) == 2 and close[1] - close[0] < 1e-6:
        return
    writes = {i: 10 + i for i in step.commit} | dict(draft)
    left = [i for i in ahead if i not in step.commit]
    wanted = [(i, 10 + i) for i in top_k(scores, left, count - 1)]
    assert made(strategy, view) == (writes, wanted)


def test_the_kit_finds_nothing():
    params = {"branches": 4, "threshold": 0.6, "block": 3}
    check_strategy(Lopa, params=params, block_length=8, compiling="no")


def test_registered_with_bounds():
    assert STRATEGIES["lopa"] is Lopa
    assert Lopa.needs == {"branches"} and Lopa.needs_branches
    assert Lopa.branches(LopaParams(branches=3)) == 3
    assert LopaParams().model_dump() == {
        "branches": 4,
        "threshold": 0.9,
        "block": 0,
        "open_at": 0.1,
        "due_at": 0.95,
    }
    assert numeric_fields(LopaParams) == list(LopaParams.model_fields)
    for bad in ({"branches": 0}, {"branches": 17}, {"threshold": 2.1}, {"open_at": 0}):
        with pytest.raises(ValidationError):
            LopaParams(**bad)
