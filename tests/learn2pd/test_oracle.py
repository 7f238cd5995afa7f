# SPDX-License-Identifier: Apache-2.0
"""The oracle of Learn2PD's traces: a block in two or three steps."""

from __future__ import annotations

from dataclasses import replace

import torch
from reference.views import CPU, MASK_ID, make_view

from vllm_dlm.learn2pd.oracle import Oracle, OracleParams
from vllm_dlm.strategies.base import Decision, View


def open_block(
    candidate: list[int], state: dict[str, torch.Tensor], width: int = 4
) -> View:
    """A block of 4 positions, all masked, of which `width` are in the canvas."""
    valid = torch.arange(4)[None] < width
    return make_view(
        torch.full((1, 4), 0.5),
        valid,
        valid=valid,
        candidate=torch.tensor([candidate]),
        state=state,
    )


def oracle(*answer: int) -> tuple[Oracle, dict[str, torch.Tensor]]:
    strategy = Oracle(OracleParams(answer=answer), 4, CPU)
    return strategy, {"best": torch.full((1, 4), -1)}


def after(view: View, decision: Decision, candidate: list[int]) -> View:
    """The next view of the block, with new best tokens."""
    written = decision.commit
    tokens = torch.where(written, decision.new_tokens, view.tokens)
    return replace(
        view,
        tokens=tokens,
        masked=view.masked & ~written,
        decided=view.decided | written,
        candidate=torch.tensor([candidate]),
        state=dict(decision.state),
    )


def test_a_step_writes_what_is_right_already():
    strategy, state = oracle(7, 8, 9, 6)
    view = open_block([7, 5, 9, 5], state)
    first = strategy.select(view, {})
    assert first.commit.tolist() == [[True, False, True, False]]
    # Another best token of one position: the block goes on.
    view = after(view, first, [7, 8, 9, 5])
    second = strategy.select(view, {})
    assert second.commit.tolist() == [[False, True, False, False]]
    # No best token is another one: what is left is written from the text.
    third = strategy.select(after(view, second, [7, 8, 9, 5]), {})
    assert third.commit.tolist() == [[False, False, False, True]]
    assert third.new_tokens[0, 3] == 6
    assert not any(one.idle.any() for one in (first, second, third))


def test_a_step_in_which_nothing_is_right_is_idle():
    strategy, state = oracle(7, 8, 9, 6)
    view = open_block([5, 5, 5, 5], state)
    first = strategy.select(view, {})
    assert first.idle.all() and not first.commit.any()
    second = strategy.select(after(view, first, [5, 5, 5, 5]), {})
    assert second.commit.all() and second.new_tokens.tolist() == [[7, 8, 9, 6]]


def test_behind_the_known_text_the_best_tokens_are_written_at_the_end():
    strategy, state = oracle(7, 8)
    view = open_block([7, 8, 5, 4], state)
    first = strategy.select(view, {})
    assert first.commit.tolist() == [[True, True, False, False]]
    second = strategy.select(after(view, first, [7, 8, 5, 4]), {})
    assert second.new_tokens.tolist() == [[7, 8, 5, 4]]
    assert second.commit.tolist() == [[False, False, True, True]]


def test_what_is_beyond_the_canvas_holds_nothing_up():
    strategy, state = oracle(7, 8, 9)
    view = open_block([7, 8, 5, 1], state, width=3)
    first = strategy.select(view, {})
    second = strategy.select(after(view, first, [7, 8, 5, 2]), {})
    assert second.commit.tolist() == [[False, False, True, False]]
    assert second.new_tokens[0, 2] == 9 != MASK_ID
