# SPDX-License-Identifier: Apache-2.0
"""End-of-text prediction (EoTP): cut the canvas where the model says the text ends.

What lies beyond the end of the text is padding, which in long canvases is most of the
work. Source: Learn2PD, arXiv 2509.25188, but for any strategy. Here a prediction needs
a confidence, because a lone unsure end-of-text guess far to the right would cut the
answer short. The mode "block" keeps the rest of the block with the end as well: a model
was not trained on canvases that end with the text, and the rest costs no forward.

The mode "canvas" is "block", and looks right of the active block too (`lookout.py`), as
far as the forward computes rows there. The text is never cut by what is predicted far
away: the canvas ends with a block, and should no end be written in it, the text goes on
in a further canvas.
"""

from __future__ import annotations

from typing import get_args

import torch

from vllm_dlm.config.options import EndOfText
from vllm_dlm.strategies.base import View

MODES: tuple[EndOfText, ...] = get_args(EndOfText)


def end_of_text(
    view: View,
    write: torch.Tensor,
    is_end: torch.Tensor,
    threshold: torch.Tensor,
) -> torch.Tensor:
    """Block position after which nothing of the canvas is needed any more.

    That is the first end-of-text token among those written in this step or, if there
    is none, the first one predicted at a position still masked.

    Args:
        write: [R, B] bool, the positions that this step writes.
        is_end: [R, B] bool: what would be written there ends the text.
        threshold: [R], least confidence of a prediction.

    Returns:
        [R] int64; -1 where the text does not end.
    """
    written = _first(write & is_end)
    sure = view.confidence >= threshold[:, None]
    predicted = _first(view.masked & ~write & view.is_eos & sure)
    return torch.where(written >= 0, written, predicted)


def canvas_cut(
    end: torch.Tensor,
    ahead: torch.Tensor,
    mode: torch.Tensor,
    may_rewrite: torch.Tensor,
    block_length: torch.Tensor,
    own: torch.Tensor | None,
) -> torch.Tensor:
    """Block position after which the canvas ends, [R] int64; -1 cuts nothing.

    It may lie beyond the block. A cut inside the block ends the request when what is
    left is full. Where decided tokens may change until the block is done, so may the
    one that ends the text: then the block is kept whole, as in the mode "block".

    Args:
        end: [R] int64, of `end_of_text`.
        ahead: [R] int64: the first position behind the block, counted from the block's
            start, where `lookout.py` has seen an end; far beyond any canvas for none.
        mode: [R] int64, index into `MODES`.
        may_rewrite: [R] bool.
        block_length: [R] int64.
        own: [R] int64, the strategies' own cuts; the one further left counts.
    """
    whole = may_rewrite | (mode != MODES.index("token"))
    cut = torch.where(whole, block_length - 1, end)
    far = (ahead // block_length + 1) * block_length - 1
    looks = mode == MODES.index("canvas")
    cut = torch.where(end >= 0, cut, torch.where(looks, far, -1))
    cut = torch.where(mode != MODES.index("off"), cut, -1)
    if own is None:
        return cut
    return torch.where((own >= 0) & ((cut < 0) | (own < cut)), own, cut)


def _first(flags: torch.Tensor) -> torch.Tensor:
    places = torch.arange(flags.shape[1], device=flags.device)
    none = torch.full_like(places, flags.shape[1])
    first = torch.where(flags, places, none).amin(dim=1)
    return torch.where(first < flags.shape[1], first, -1)
