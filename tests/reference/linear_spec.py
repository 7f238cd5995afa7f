# SPDX-License-Identifier: Apache-2.0
"""LinearSpec in plain loops: draft a block both ways, verify it causally (2607.05722).

And what it must equal: a causal model that writes one token after the other. Greedy;
the mask id is never predicted. Every forward computes the whole row anew.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from reference.network import TinyModel, causal_context
from reference.procedures import row_statistics


def read(
    model: TinyModel,
    row: list[int],
    first: int,
    allowed: Collection[int],
    whole_from: int | None = None,
) -> list[int]:
    """What the rows from `first` on predict.

    Args:
        allowed: the only tokens that there are; none for all of them.
        whole_from: positions from here on see each other; None for causal attention.
    """
    start = len(row) if whole_from is None else whole_from
    logits = model.forward(row, visible=causal_context(len(row), start))
    if allowed:
        others = torch.ones(logits.shape[1], dtype=torch.bool)
        others[list(allowed)] = False
        logits = logits.masked_fill(others, -torch.inf)
    best: torch.Tensor = row_statistics(logits[first:], model.mask_id).argmax
    return best.tolist()


def until(tokens: list[int], max_tokens: int, eos_ids: Collection[int]) -> list[int]:
    """The tokens up to the end of the text, included."""
    ends = [i for i, token in enumerate(tokens) if token in eos_ids]
    return tokens[: min([max_tokens, *(i + 1 for i in ends)])]


def one_by_one(
    model: TinyModel,
    prompt: list[int],
    max_tokens: int,
    eos_ids: Collection[int] = (),
    allowed: Collection[int] = (),
) -> list[int]:
    """A text of `max_tokens`, each token from a causal forward of its own."""
    row = list(prompt)
    while len(row) < len(prompt) + max_tokens:
        row.append(read(model, row, len(row) - 1, allowed)[0])
    return until(row[len(prompt) :], max_tokens, eos_ids)


def linear_spec(
    model: TinyModel,
    prompt: list[int],
    max_tokens: int,
    block_length: int,
    eos_ids: Collection[int] = (),
    allowed: Collection[int] = (),
) -> tuple[list[int], int]:
    """The text, and its forwards: one for the prompt, and two a round.

    A round drafts behind the text's last token, `block_length` positions with it.
    """
    row, end = list(prompt), len(prompt) + max_tokens
    row.append(read(model, row, len(row) - 1, allowed)[0])
    forwards = 1
    while len(row) < end and not set(row[len(prompt) :]) & set(eos_ids):
        last = len(row) - 1
        stop = min(last + block_length, end)
        masks = [model.mask_id] * (stop - len(row))
        drafts = read(model, [*row, *masks], last + 1, allowed, whole_from=last)
        predicted = read(model, [*row, *drafts], last, allowed)
        forwards += 2
        for draft, token in zip([*drafts, None], predicted, strict=True):
            row.append(token)
            if draft != token:
                break
        row = row[:end]
    return until(row[len(prompt) :], max_tokens, eos_ids), forwards


def written(
    masked: list[bool], drafts: list[int | None], predicted: list[int]
) -> list[int]:
    """What a verification writes: places, from the left on, of one row.

    Args:
        masked: positions that the forward has predicted.
        drafts: None where there was none.
    """
    places = []
    for place, is_mask in enumerate(masked):
        if not is_mask:
            continue
        places.append(place)
        if drafts[place] != predicted[place]:
            break
    return places
