# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.levenshtein import MASK, EditedBlock
from reference.views import CPU, MASK_ID, first_state, make_view, row_params

from vllm_dlm.strategies.base import EditTokens, View
from vllm_dlm.strategies.levenshtein import Levenshtein, LevenshteinParams

DELETE, INSERT = 1, 2
CONTEXT = replace(CPU, edit_tokens=EditTokens(DELETE, INSERT))


def levenshtein(width: int, **params: Any) -> Levenshtein:
    return Levenshtein(LevenshteinParams(**params), width, CONTEXT)


def drawn(
    generator: torch.Generator, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Few tokens, of which many delete and insert; confidences with ties."""
    best = torch.randint(1, 7, shape, generator=generator)
    other = 3 + (best + torch.randint(1, 4, shape, generator=generator)) % 5
    other = torch.where(other == best, 3 + (other - 2) % 5, other)
    confidence = torch.rand(shape, generator=generator)
    return best, (confidence * 8).round() / 8, other


def view_of(blocks: list[EditedBlock], width: int, state: dict, step: int) -> View:
    """The blocks as a strategy sees them; those that are over stay as they are."""
    rows = len(blocks)
    tokens = torch.zeros(rows, width, dtype=torch.int64)
    masked, valid = torch.zeros(2, rows, width, dtype=torch.bool)
    positions = torch.arange(width).repeat(rows, 1)
    for row, block in enumerate(blocks):
        length = len(block.tokens)
        tokens[row, :length] = torch.tensor(block.tokens)
        valid[row, :length] = True
        positions[row] -= block.prompt
    masked = tokens == MASK
    return replace(
        make_view(torch.zeros(rows, width), masked),
        tokens=torch.where(masked, MASK_ID, tokens),
        valid=valid,
        decided=valid & ~masked & (positions >= 0),
        positions=positions,
        step=torch.full((rows,), step),
        state=state,
    )


@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 9),
    mask_threshold=st.sampled_from([0.0, 0.5, 0.75, 1.2]),
    edit_threshold=st.sampled_from([0.0, 0.25, 0.875, 1.2]),
    max_post_steps=st.integers(1, 6),
)
def test_whole_blocks(seed, width, mask_threshold, edit_threshold, max_post_steps):
    """Whatever a model thinks in each step, blocks are what the plain lists are."""
    numbers = {
        "mask_threshold": mask_threshold,
        "edit_threshold": edit_threshold,
        "max_post_steps": max_post_steps,
    }
    strategy = levenshtein(width, **numbers)
    generator = torch.Generator().manual_seed(seed)
    rows, blocks = 4, []
    for _ in range(rows):
        length = int(torch.randint(1, width + 1, (), generator=generator))
        prompt = int(torch.randint(0, length, (), generator=generator))
        # A prompt may hold the ids of edits: they are text there.
        known = torch.randint(1, 7, (prompt,), generator=generator).tolist()
        most = 2 * width + max_post_steps
        tokens = known + [MASK] * (length - prompt)
        blocks.append(EditedBlock(tokens, prompt, DELETE, INSERT, most, **numbers))
    state, step = first_state(strategy, rows), 0
    # A model that comes back to what it thought makes loops.
    thoughts = [drawn(generator, (rows, width)) for _ in range(3)]
    while not all(block.is_over for block in blocks):
        thought = int(torch.randint(0, 3, (), generator=generator))
        best, confidence, other = thoughts[thought]
        view = view_of(blocks, width, state, step)
        view = replace(
            view,
            candidate=best,
            confidence=confidence,
            other=other,
        )
        decision = strategy.select(view, row_params(strategy, rows))
        state = {**state, **decision.state}
        step += 1
        for row, block in enumerate(blocks):
            if block.is_over:
                continue
            block.step(
                best[row].tolist(),
                confidence[row].tolist(),
                other[row].tolist(),
            )
            length = len(block.tokens)
            got = view.tokens[row].clone()
            write = decision.commit[row] | decision.edit[row]
            got[write] = decision.new_tokens[row][write]
            got[decision.remask[row]] = MASK_ID
            got = torch.where(got == MASK_ID, MASK, got)
            assert got[:length].tolist() == block.tokens
            is_full = MASK not in block.tokens
            assert bool(decision.hold[row]) == (is_full and not block.is_over)
            assert not (write & ~view.valid[row]).any()


def one_step(tokens: list[int], best: list[int], **changes: Any) -> list[int]:
    """A sure step of a block in which -1 is a mask."""
    block = torch.tensor([tokens])
    strategy = levenshtein(len(tokens))
    view = replace(
        make_view(torch.ones(1, len(tokens)) * 0.9, block == MASK),
        tokens=torch.where(block == MASK, MASK_ID, block),
        candidate=torch.tensor([best]),
        other=torch.full_like(block, 9),
        state=first_state(strategy, 1),
    )
    view = replace(view, **changes)
    decision = strategy.select(view, row_params(strategy, 1))
    got = torch.where(decision.commit | decision.edit, decision.new_tokens, view.tokens)
    got[decision.remask] = MASK_ID
    return torch.where(got == MASK_ID, MASK, got)[0].tolist()


@pytest.mark.parametrize(
    ("tokens", "best", "after"),
    [
        ([5, 6, 7, 8], [5, DELETE, 7, 8], [5, 7, 8, MASK]),
        ([5, 6, 7, 8], [5, INSERT, 7, 8], [5, MASK, 6, 7]),
        ([5, 6, 7, 8], [5, INSERT, DELETE, 3], [5, MASK, 6, 3]),
        ([5, 6, 7, 8], [DELETE] * 4, [MASK] * 4),
        ([5, 6, 7, 8], [INSERT] * 4, [MASK, 5, MASK, 6]),
        ([5, MASK, 7, 8], [5, DELETE, 7, 8], [5, 7, 8, MASK]),
        # Before a mask: both are masks, and the second is the first one still.
        ([5, MASK, 7, 8], [5, INSERT, 7, 8], [5, MASK, MASK, 7]),
        ([5, 6, 7, INSERT], [5, 6, 7, INSERT], [5, 6, 7, INSERT]),
    ],
)
def test_edits_by_hand(tokens, best, after):
    assert one_step(tokens, best) == after


def test_the_prompt_does_not_move():
    tokens, best = [DELETE, 6, 7, 8], [5, DELETE, DELETE, 8]
    positions = torch.tensor([[-2, -1, 0, 1]])
    decided = positions >= 0
    after = one_step(tokens, best, positions=positions, decided=decided)
    assert after == [DELETE, 6, 8, MASK]


def test_models_without_edits_are_refused():
    with pytest.raises(ValueError, match=r"delete_token_id.*'joint'"):
        Levenshtein.validate(LevenshteinParams(), 8, CPU)
    Levenshtein.validate(LevenshteinParams(), 8, CONTEXT)
