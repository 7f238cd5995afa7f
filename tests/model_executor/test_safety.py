# SPDX-License-Identifier: Apache-2.0
"""How a block ends: by its schedule with the masks that are left, or with tokens."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reference.views import make_view

from vllm_dlm.model_executor.columns import NEVER
from vllm_dlm.model_executor.planning.block_rows import (
    CANVAS_END,
    SLOT,
    pack,
)
from vllm_dlm.model_executor.planning.branches import GroupRows
from vllm_dlm.model_executor.sampling.rows import Rows
from vllm_dlm.model_executor.sampling.safety import SafeDecision, Safety
from vllm_dlm.model_executor.slots import RequestSlots
from vllm_dlm.strategies.base import Decision, View

MASK = 99


class Ending:
    """One request in step `step` of its block, as the engine keeps it.

    Bad words and ends of text, which others look after, are left out.
    """

    def __init__(
        self, step: int, limit: int, reference_steps: int = NEVER, exact: bool = True
    ) -> None:
        self.facts: Any = SimpleNamespace(
            mask_id=MASK, tile_rows=8, max_num_tokens=8, device=torch.device("cpu")
        )
        self.slots = RequestSlots(1, 4, MASK, torch.device("cpu"))
        self.slots.step[0] = step
        self.slots.exact[0] = self.slots.host.exact[0] = exact
        self.slots.step_limit[0] = limit
        self.slots.reference_steps[0] = reference_steps
        self.slots.may_rewrite[0] = True
        row_at = np.arange(4)[None]
        columns = {SLOT: np.zeros(1), CANVAS_END: np.full(1, 4)}
        packed = pack(columns, row_at, dummy_slot=1, dummy=1)
        self.rows = GroupRows(
            slots_np=np.array([0]),
            batch_rows_np=np.array([0]),
            width=4,
            row_at_np=row_at,
            first_row=0,
            row_request_np=np.zeros(4, dtype=np.int64),
            row_offset_np=np.arange(4),
            packed_np=packed,
            packed=torch.from_numpy(packed),
            table=self.slots,
        )

    def held(self, view: View, decision: Decision) -> SafeDecision:
        safety = Safety(self.slots, self.facts, None)  # type: ignore[arg-type]
        return safety.hold_to_rules(view, decision, self.rows.blocks)

    def may_choose_the_mask(self) -> bool:
        head: Any = SimpleNamespace(vocab_shard=None)
        rows = Rows(self.slots, self.facts, head, None)  # type: ignore[arg-type]
        plan: Any = SimpleNamespace(groups=[self.rows], lookout=None)
        banned = rows.logits(torch.zeros(4, 2), plan).banned
        return banned is not None and not bool(banned.any())


def block(masked: list[int], candidates: list[int]) -> View:
    mask = torch.tensor([masked], dtype=torch.bool)
    view = make_view(torch.full((1, 4), 0.5), mask)
    return replace(
        view,
        tokens=torch.where(mask, MASK, 5),
        decided=~mask,
        candidate=torch.tensor([candidates]),
    )


def first(mask: torch.Tensor) -> torch.Tensor:
    """Of one row, the leftmost position."""
    return mask & (mask.cumsum(dim=1) == 1)


def test_a_schedule_leaves_masks_as_text():
    view = block([0, 1, 1, 1], [5, 6, 7, 8])
    ending = Ending(step=2, limit=4, reference_steps=3)
    held = ending.held(view, Decision(first(view.masked)))
    assert held.keeps_masks.all()
    assert held.commit.tolist() == [[False, True, True, True]]
    assert held.new_tokens[0, 1:].tolist() == [6, MASK, MASK]
    assert ending.may_choose_the_mask()


def test_a_schedule_ends_nothing_before_its_time():
    view = block([0, 1, 1, 1], [5, 6, 7, 8])
    ending = Ending(step=1, limit=4, reference_steps=3)
    held = ending.held(view, Decision(first(view.masked)))
    assert not held.keeps_masks.any()
    assert held.commit.equal(first(view.masked))


@pytest.mark.parametrize("exact", [False, True])
def test_what_follows_no_schedule_ends_with_tokens(exact: bool):
    view = block([0, 1, 1, 1], [5, 6, 7, 8])
    for step in (0, 2):
        ending = Ending(step, limit=4, exact=exact)
        held = ending.held(view, Decision(first(view.masked)))
        assert held.commit.equal(first(view.masked))
        assert ending.may_choose_the_mask() == exact
    ending = Ending(step=3, limit=4, exact=exact)
    held = ending.held(view, Decision(first(view.masked)))
    assert not held.keeps_masks.any()
    assert held.commit.tolist() == [[False, True, True, True]]
    assert held.new_tokens[0, 1:].tolist() == [6, 7, 8]
    # So that there is a token to write.
    assert not ending.may_choose_the_mask()


def test_an_edit_that_chooses_the_mask_id_masks_again():
    view = block([0, 0, 1, 1], [MASK, 4, 7, MASK])
    edit = torch.tensor([[True, True, False, False]])
    decision = Decision(view.masked, edit=edit)
    held = Ending(step=1, limit=20).held(view, decision)
    assert held.remask.tolist() == [[True, False, False, False]]
    assert held.edit.tolist() == [[False, True, False, False]]
    assert held.commit.equal(view.masked)
