# SPDX-License-Identifier: Apache-2.0
"""What goes, what becomes two masks, and what moves: against lists."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_dlm.model_executor.sampling.moving import moved

MASK = 0
WIDTH = 9

GOES, WIDENS, WRITTEN, MASKED = "goes", "widens", "written", "masked"

canvases = st.lists(
    st.lists(st.sampled_from((GOES, WIDENS, WRITTEN, MASKED)), max_size=WIDTH),
    min_size=1,
    max_size=5,
)


def by_list(kinds: list[str], budget: int) -> tuple[list[int], int]:
    """The tokens that are left, masks as such; and how many have become two."""
    room = WIDTH - len(kinds) + kinds.count(GOES)
    after: list[int] = []
    widened = 0
    for place, kind in enumerate(kinds):
        if kind == WIDENS and widened < min(room, budget):
            after += [MASK, MASK]
            widened += 1
        elif kind in (WIDENS, MASKED):
            after.append(MASK)
        elif kind == WRITTEN:
            after.append(10 + place)
    return after, widened


@given(canvases, st.lists(st.integers(0, 4), min_size=5, max_size=5))
def test_as_lists_do(rows: list[list[str]], budgets: list[int]):
    def flags(*kinds: str) -> torch.Tensor:
        found = torch.zeros(len(rows), WIDTH, dtype=torch.bool)
        for number, row in enumerate(rows):
            for place, kind in enumerate(row):
                found[number, place] = kind in kinds
        return found

    tokens = (10 + torch.arange(WIDTH)).repeat(len(rows), 1)
    budget = torch.tensor(budgets[: len(rows)])
    after = moved(
        tokens,
        flags(MASKED),
        flags(GOES, WIDENS, WRITTEN, MASKED),
        flags(GOES),
        flags(WIDENS),
        torch.tensor([WIDTH - len(row) for row in rows]),
        budget,
        MASK,
    )
    for number, row in enumerate(rows):
        wanted, widened = by_list(row, budgets[number])
        length = int(after.length[number])
        assert after.tokens[number, :length].tolist() == wanted
        assert after.masked[number, :length].tolist() == [t == MASK for t in wanted]
        assert int(after.widened[number]) == widened
        # Behind the canvas all is masked, as where nothing was written yet.
        assert after.masked[number, length:].all()
        assert (after.tokens[number, length:] == MASK).all()


def test_the_text_of_a_literal_mask_stays():
    """A request may write the mask id itself: it is no mask."""
    one = torch.ones(1, 3, dtype=torch.bool)
    after = moved(
        torch.tensor([[7, MASK, 8]]),
        ~one,
        one,
        torch.tensor([[True, False, False]]),
        ~one,
        torch.tensor([0]),
        torch.tensor([5]),
        MASK,
    )
    assert after.tokens.tolist() == [[MASK, 8, MASK]]
    assert after.masked.tolist() == [[False, False, True]]
