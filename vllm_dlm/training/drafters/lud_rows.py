# SPDX-License-Identifier: Apache-2.0
"""What a model reads that learns to predict several tokens behind appended pads.

A row is a text, and behind it groups of K pad tokens. A group stands for the pads that
are appended while the text is c tokens long: its pad j has the position c + j, sees the
first c tokens and the group's pads up to itself, and predicts the token c + j + 1. (The
token c is predicted by the text's own last token, as ever.) So one forward teaches the
text and several places in it.

Reconstructed from the description of LUD (arXiv 2405.15208), whose code is not public.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from vllm_dlm.training.causal import Rows


@dataclass(frozen=True)
class PaddedRows:
    """R texts of T tokens, each with G groups of K pads behind it; S = T + G * K."""

    ids: torch.Tensor
    """[R, S] int64."""
    positions: torch.Tensor
    """[R, S] int64."""
    mask: torch.Tensor
    """[R, 1, S, S] bool: True where a query (third) sees a key."""
    targets: torch.Tensor
    """[R, G, K] int64: index in the text of what each pad predicts, T at most."""
    groups: int
    tokens: int

    def of_pads(self, values: torch.Tensor) -> torch.Tensor:
        """[R, G, K, ...] of [R, S, ...]: what belongs to the pads."""
        start = self.ids.shape[1] - self.groups * self.tokens
        return values[:, start:].unflatten(1, (self.groups, self.tokens))


def with_pads(
    rows: Rows, pad_id: int, groups: int, tokens: int, seed: str
) -> PaddedRows:
    """Append groups of pads, each for a place of the answer that is drawn at random.

    Args:
        rows: The texts.
        pad_id: Id of the pad token.
        groups: G, of each text.
        tokens: K, of each group.
        seed: Of the places.
    """
    rng = random.Random(seed)
    count, width = rows.ids.shape
    device = rows.ids.device
    # From the whole prompt on, and so that something is left to predict.
    cuts = torch.tensor(
        [
            [rng.randint(start, max(start, end - 2)) for _ in range(groups)]
            for start, end in zip(rows.starts.tolist(), rows.ends.tolist(), strict=True)
        ],
        device=device,
    )
    place = torch.arange(tokens, device=device)
    text = torch.arange(width, device=device)
    pad_positions = cuts[..., None] + place
    ids = torch.cat(
        (rows.ids, rows.ids.new_full((count, groups * tokens), pad_id)), dim=1
    )
    positions = torch.cat((text.expand(count, -1), pad_positions.flatten(1)), dim=1)
    total = width + groups * tokens
    mask = torch.zeros(count, total, total, dtype=torch.bool, device=device)
    mask[:, :width, :width] = text <= text[:, None]
    mask[:, width:, :width] = text < cuts.repeat_interleave(tokens, 1)[..., None]
    of_group = torch.arange(groups * tokens, device=device) // tokens
    offset = place.repeat(groups)
    mask[:, width:, width:] = (of_group == of_group[:, None]) & (
        offset <= offset[:, None]
    )
    targets = (pad_positions + 1).clamp(max=width)
    return PaddedRows(ids, positions, mask[:, None], targets, groups, tokens)


def unit_weights(
    confidences: torch.Tensor,
    targets: torch.Tensor,
    ends: torch.Tensor,
    alpha: float,
) -> torch.Tensor:
    """Which pads are taught: those of the lexical unit that goes on behind the cut.

    A lexical unit is a run of tokens each of which is at least `alpha` probable to who
    has read all before it. What the model is not sure of even then, no pad can know.

    Args:
        confidences: [R, T] probability of each token of a text, given those before.
        targets: [R, G, K] index of the token that each pad predicts.
        ends: [R] tokens of each text.
        alpha: From 0 (every pad is taught) to 1.

    Returns:
        [R, G, K] float32: 1 or 0.
    """
    count, groups, tokens = targets.shape
    inside = targets < ends[:, None, None]
    index = targets.clamp(max=confidences.shape[1] - 1).flatten(1)
    found = confidences.gather(1, index).view(count, groups, tokens)
    return (inside & (found >= alpha)).float().cumprod(-1)
