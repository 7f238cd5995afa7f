# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.linear_spec import written
from reference.views import C8, CPU, make_view, random_view, select

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import NOT_DRAFTED, Branches, View
from vllm_dlm.strategies.linear_spec import LinearSpec, LinearSpecParams


def linear_spec(width: int = 8) -> LinearSpec:
    return LinearSpec(LinearSpecParams(), width, CPU)


def drafted(view: View, drafts: torch.Tensor, rank: torch.Tensor) -> View:
    """The view of a forward with these drafts [R, B]."""
    canvas = view.masked[:, None], view.candidate[:, None], view.confidence[:, None]
    return replace(view, branches=Branches(drafts, rank, *canvas))


def test_worked_round():
    """Drafts a b c d, read as a b x y: a, b and x are written."""
    view = make_view([C8])
    view.step.fill_(0)
    nothing = torch.full((1, 8), NOT_DRAFTED)
    first = select(linear_spec(), drafted(view, torch.zeros(1, 8).long(), nothing))
    assert first.idle is not None and first.idle.all() and not first.commit.any()
    assert first.draft_rank is not None and first.draft_tokens is not None
    is_draft = first.draft_rank != NOT_DRAFTED
    assert torch.equal(is_draft, view.masked)
    assert torch.equal(first.draft_tokens, view.candidate)

    masked = torch.tensor([[True, True, True, True]])
    read = make_view([[0.5] * 4], masked, candidate=torch.tensor([[1, 2, 9, 8]]))
    read.step.fill_(1)
    rank = torch.tensor([[0, 0, 0, NOT_DRAFTED]])
    verified = drafted(read, torch.tensor([[1, 2, 3, 4]]), rank)
    second = select(linear_spec(4), verified)
    assert second.commit.tolist() == [[True, True, True, False]]
    assert second.idle is not None and not second.idle.any()
    assert second.draft_rank is not None
    assert (second.draft_rank == NOT_DRAFTED).all()


@given(seed=st.integers(0, 2**20), right=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_agrees_with_a_row_wise_reading(seed, right):
    source, view = random.Random(seed), random_view(seed)
    view.step.fill_(1)
    rows, width = view.masked.shape
    drafts = [
        [
            source.choice([None, 101, token])
            if source.random() >= right
            else (token if is_mask else None)
            for token, is_mask in zip(tokens, masks, strict=True)
        ]
        for tokens, masks in zip(
            view.candidate.tolist(), view.masked.tolist(), strict=True
        )
    ]
    tokens = torch.tensor([[one or 0 for one in row] for row in drafts])
    rank = torch.tensor(
        [[NOT_DRAFTED if one is None else 0 for one in row] for row in drafts]
    )
    decision = select(linear_spec(width), drafted(view, tokens, rank))
    for row in range(rows):
        wanted = written(
            view.masked[row].tolist(), drafts[row], view.candidate[row].tolist()
        )
        assert decision.commit[row].nonzero()[:, 0].tolist() == wanted


def test_needs_branches():
    with pytest.raises(ValueError, match=r"needs View\.branches"):
        select(linear_spec(), make_view([C8]))


def test_registered():
    assert STRATEGIES["linear_spec"] is LinearSpec
    assert LinearSpec.verifies and LinearSpecParams.model_fields == {}
