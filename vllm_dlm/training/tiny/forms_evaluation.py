# SPDX-License-Identifier: Apache-2.0
"""How many held-out problems llada-forms answers right, by a plain decoder."""

from __future__ import annotations

import random
from collections.abc import Sequence

from vllm_dlm.tasks.forms.problems import KINDS, held_out_problems
from vllm_dlm.tasks.forms.rows import Row, encode_row
from vllm_dlm.tasks.forms.vocabulary import MASK_ID, decode
from vllm_dlm.training.tiny.llada_evaluation import fill_masks
from vllm_dlm.training.tiny.llada_modeling import LLaDAModel


def is_right(row: Row, canvas: Sequence[int]) -> bool:
    """Whether a decoded canvas holds the right text in every hole.

    A hole ends at its first <|endoftext|>.
    """
    return all(
        decode(list(canvas[start:end])) == decode(row.canvas[start:end])
        for start, end in _holes(row)
    )


def _holes(row: Row) -> list[tuple[int, int]]:
    """Where the holes of a canvas begin and end."""
    edges = [
        index
        for index, (left, right) in enumerate(
            zip([False, *row.hole], [*row.hole, False], strict=True)
        )
        if left != right
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


def evaluate_kind(
    model: LLaDAModel,
    kind: str,
    count: int,
    *,
    canvas: int,
    seed: int,
    tokens_per_step: int = 1,
    block_length: int = 32,
    batch_size: int = 32,
) -> float:
    """Share of held-out problems of a kind that the model answers right.

    Args:
        model: The model.
        kind: A key of `KINDS`.
        count: How many problems.
        canvas: Width of the canvas of a free answer, if the answer needs no more.
        seed: Seed of the problems, and of the width of their holes.
        tokens_per_step: Tokens committed per forward pass and row.
        block_length: Length of a block.
        batch_size: Problems that are decoded together.
    """
    rng = random.Random(f"forms-width-{kind}-{seed}")
    problems = held_out_problems(kind, count, seed)
    was_training = model.training
    model.eval()
    right = 0
    for first in range(0, len(problems), batch_size):
        rows = []
        for problem in problems[first : first + batch_size]:
            row = encode_row(problem, rng)
            if problem.open_end and problem.pieces[-1].is_hole:
                row = row.widen(len(row.prompt) + max(canvas, len(row.canvas)))
            rows.append(row)
        found = fill_masks(
            model,
            [(row.prompt, row.masked) for row in rows],
            mask_id=MASK_ID,
            eos_id=None,
            block_length=block_length,
            tokens_per_step=tokens_per_step,
        )
        right += sum(map(is_right, rows, found))
    model.train(was_training)
    return right / len(problems)


def evaluate_model(
    model: LLaDAModel,
    per_kind: int,
    *,
    canvas: int = 96,
    seed: int = 0,
    tokens_per_step: int = 1,
) -> dict[str, float]:
    """Share of right answers per kind, and over all kinds as "all"."""
    shares = {
        kind: evaluate_kind(
            model,
            kind,
            per_kind,
            canvas=canvas,
            seed=seed,
            tokens_per_step=tokens_per_step,
        )
        for kind in KINDS
    }
    weights = {kind: weight for kind, (weight, _) in KINDS.items()}
    total = sum(weights[kind] * share for kind, share in shares.items())
    return {**shares, "all": total / sum(weights.values())}
