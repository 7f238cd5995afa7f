# SPDX-License-Identifier: Apache-2.0
"""Growth: whether a canvas is wide enough for its text, and how wide it is to be.

A block's first step computes all of the canvas, whatever the cache policy; so it is
there that a canvas may grow. A forward that lets it grow writes nothing: the block
begins anew, on the wider canvas. Sources: DAEDAL, arXiv 2508.00819; rho-EOS, arXiv
2601.22527 (`config/growth.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

UNIT = 1 << 24
"""A confidence of 1: sums of integers are exact, in any order of requests."""

SEGMENT = 0.1
"""rho-EOS: a canvas grows by twice as much for each such share of ends that lacks."""
MOST_SEGMENTS = 4


class Ends(NamedTuple):
    """Masks of canvases that are predicted to be ends of texts; [R] int64 each."""

    number: torch.Tensor
    sure: torch.Tensor
    """Confidence of the rightmost `window` of them together, in `UNIT`s."""
    masks: torch.Tensor
    """Masks that were looked at."""


def with_block(
    ahead: Ends,
    is_end: torch.Tensor,
    confidence: torch.Tensor,
    masked: torch.Tensor,
    window: torch.Tensor,
) -> Ends:
    """The ends of whole canvases.

    Args:
        ahead: those right of the active blocks.
        is_end: [R, B] bool: masks of the block that are predicted to be ends.
        confidence: [R, B] float32.
        masked: [R, B] bool: all masks of the block.
        window: [R] int64.
    """
    # How many ends there are from each one on, to the right.
    nth = is_end.flip(1).cumsum(1).flip(1) + ahead.number[:, None]
    counts = is_end & (nth <= window[:, None])
    sure = torch.where(counts, in_units(confidence), 0).sum(dim=1)
    return Ends(
        ahead.number + is_end.sum(dim=1),
        ahead.sure + sure,
        ahead.masks + masked.sum(dim=1),
    )


def in_units(confidence: torch.Tensor) -> torch.Tensor:
    """Probabilities, as integers."""
    return (confidence.double() * UNIT).round().long()


def expansion_of(
    ends: Ends,
    expansion: torch.Tensor,
    window: torch.Tensor,
    threshold: torch.Tensor,
) -> torch.Tensor:
    """[R] int64: positions that canvases lack; 0 where there are enough.

    Args:
        ends: of whole canvases.
        expansion, window: [R] int64, of `config.growth.Growth`.
        threshold: [R] float32.
    """
    by_confidence = window > 0
    share = torch.where(
        by_confidence,
        ends.sure.double() / (UNIT * window.clamp(min=1)),
        ends.number.double() / ends.masks.clamp(min=1),
    )
    # In the threshold's own type: a share that is equal is enough.
    lacks = threshold - share.float()
    segments = (lacks.double() / SEGMENT).ceil().clamp(1, MOST_SEGMENTS).long()
    times = torch.where(by_confidence, 1, 2 ** (segments - 1))
    return torch.where(lacks > 0, expansion * times, 0)
