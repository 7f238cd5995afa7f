# SPDX-License-Identifier: Apache-2.0
"""Blocks decoded to their end: a strategy that remembers against its row-wise rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from reference import procedures
from reference.views import (
    first_state,
    make_view,
    random_view,
    select,
    take_rows,
    with_probabilities,
)

from vllm_dlm.strategies.base import Decision, Strategy, View, numeric_fields

FIRST_TEXT = 2
"""Tokens below it end the text."""


def decisions_of(strategy: Strategy, probabilities: torch.Tensor) -> list[Decision]:
    """Decisions of [steps, 1, B, V] with all positions masked throughout."""
    masked = torch.ones(probabilities.shape[1:3], dtype=torch.bool)
    view, found = make_view(torch.zeros(masked.shape), masked), []
    for distributions in probabilities:
        found.append(select(strategy, with_probabilities(view, distributions)))
        view = replace(view, state=found[-1].state)
    return found


def random_block(
    seed: int, rows: int = 4, width: int = 6, vocab: int = 12
) -> tuple[View, torch.Tensor]:
    """A random first view, and the distributions [steps, R, B, V] that follow.

    They move much, little or not at all from step to step, by row.
    """
    generator = torch.Generator().manual_seed(seed)
    view = random_view(seed, rows, width)
    first = 3 * torch.randn(1, rows, width, vocab, generator=generator)
    moves = torch.randn(width, rows, width, vocab, generator=generator)
    scale = torch.tensor([0.0, 0.05, 0.3, 2.0])[
        torch.randint(4, (1, rows, 1, 1), generator=generator)
    ]
    return view, (first + scale * moves).softmax(dim=-1)


def walk(
    strategy: Strategy,
    view: View,
    probabilities: torch.Tensor,
    numbers: Sequence[dict[str, Any]],
) -> list[tuple[View, Decision]]:
    """What a strategy sees and decides, step by step, until no mask is left.

    Args:
        view: of the first step; its statistics are overwritten.
        probabilities: [steps, R, B, V].
        numbers: the numeric parameters of each row.
    """
    names = numeric_fields(type(strategy.params))
    parameters = {name: torch.tensor([row[name] for row in numbers]) for name in names}
    view = replace(view, state=first_state(strategy, len(numbers)))
    seen: list[tuple[View, Decision]] = []
    for step, distributions in enumerate(probabilities):
        view = with_probabilities(view, distributions)
        view = replace(view, step=torch.full_like(view.step, step))
        view = replace(view, is_eos=view.candidate < FIRST_TEXT)
        decision = strategy.select(view, parameters)
        seen.append((view, decision))
        tokens = view.candidate if decision.new_tokens is None else decision.new_tokens
        edit, remask = changed(view, decision)
        masked = (view.masked & ~decision.commit) | remask
        view = replace(
            view,
            tokens=torch.where(decision.commit | edit, tokens, view.tokens),
            masked=masked,
            decided=(view.decided | decision.commit) & ~remask,
            state={**view.state, **(decision.state or {})},
        )
        held = decision.hold is not None and bool(decision.hold.any())
        if not held and not masked.any():
            break
    assert not view.masked.any(), "masks are left after as many steps as positions"
    return seen


def changed(view: View, decision: Decision) -> list[torch.Tensor]:
    """[R, B] bool each: what a step edits, and what it masks again."""
    nothing = torch.zeros_like(view.masked)
    parts = (decision.edit, decision.remask)
    return [nothing if part is None else part for part in parts]


def places(mask: torch.Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


def written(view: View, decision: Decision) -> list[dict[int, int]]:
    """Position -> token that a step writes, per row."""
    tokens = view.candidate if decision.new_tokens is None else decision.new_tokens
    return [
        {int(i): int(row_tokens[i]) for i in row.nonzero()[:, 0]}
        for row, row_tokens in zip(decision.commit, tokens, strict=True)
    ]


def assert_agrees(
    strategy: Strategy,
    rule: Callable[..., procedures.Rule],
    view: View,
    probabilities: torch.Tensor,
    numbers: Sequence[dict[str, Any]],
) -> None:
    """The strategy writes what the rule does, in every step and row of a block.

    Args:
        rule: makes the rule of a row from its numbers.
        others: see `walk`.
    """
    rules = [rule(**row) for row in numbers]
    for step, (seen, decision) in enumerate(
        walk(strategy, view, probabilities, numbers)
    ):
        for row, got in enumerate(written(seen, decision)):
            wanted = rules[row].step(row_view(seen, row, step))
            tokens = wanted.commit
            if not isinstance(tokens, dict):
                tokens = {i: int(seen.candidate[row, i]) for i in tokens}
            assert got == tokens, (step, row)
            edit, remask = changed(seen, decision)
            assert places(edit[row]) == sorted(wanted.edit), (step, row)
            if isinstance(wanted.edit, dict) and decision.new_tokens is not None:
                for i, token in wanted.edit.items():
                    assert int(decision.new_tokens[row, i]) == token, (step, row)
            assert places(remask[row]) == sorted(wanted.remask), (step, row)
            held = decision.hold is not None and bool(decision.hold[row])
            assert held == wanted.hold, (step, row)


def row_view(view: View, row: int, step: int) -> procedures.View:
    """What the row-wise rules see of a row; it is cut where the block is."""
    assert view.probabilities is not None
    assert view.entropy is not None and view.margin is not None
    size = int(view.valid[row].sum())
    everything = torch.arange(view.probabilities.logits.logits.shape[1])
    dense = view.probabilities.of(everything.expand(*view.masked.shape, -1))
    return procedures.View(
        masked=view.masked[row, :size],
        argmax=view.candidate[row, :size],
        confidence=view.confidence[row, :size],
        margin=view.margin[row, :size],
        entropy=view.entropy[row, :size],
        probabilities=dense[row, :size],
        first=0,
        forward=step,
        scheduled=int(view.scheduled[row]),
        step=step,
        steps=int(view.steps[row]),
        tokens=view.tokens[row, :size],
        decided=view.decided[row, :size],
    )


def assert_rows_alone(
    strategy: Strategy,
    view: View,
    probabilities: torch.Tensor,
    numbers: Sequence[dict[str, Any]],
) -> None:
    """Each row decides as it does in a batch of its own, whatever the others do.

    Also where another row had its place before: what it left is not seen.
    """
    together = walk(strategy, view, probabilities, numbers)
    for row in range(len(numbers)):
        index = torch.tensor([row])
        alone = walk(
            strategy,
            take_rows(view, index),
            probabilities[:, index],
            [numbers[row]],
        )
        for step, (seen, decision) in enumerate(alone):
            in_batch = written(*together[step])[row]
            assert written(seen, decision)[0] == in_batch, (step, row)
            for one, other in zip(
                changed(seen, decision), changed(*together[step]), strict=True
            ):
                assert torch.equal(one[0], other[row]), (step, row)
