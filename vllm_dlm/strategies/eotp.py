# SPDX-License-Identifier: Apache-2.0
"""End-of-text prediction (EoTP): cut the canvas where the model says the text ends.

What lies beyond the end of the text is padding, which in long canvases is most of the
work. Source: Learn2PD, arXiv 2509.25188; here the prediction needs a confidence and
stays inside the active block, because a lone unsure end-of-text guess far to the right
would cut the answer short. Learn2PD's default keeps the rest of that block as well: a
model was not trained on canvases that end with the text, and the rest costs no forward.
"""

from __future__ import annotations

import torch

from vllm_dlm.strategies.base import View


def end_of_text(
    view: View, commit: torch.Tensor, threshold: torch.Tensor
) -> torch.Tensor:
    """Block position after which nothing of the canvas is needed any more.

    That is the first end-of-text token among those written in this step or, if there
    is none, the first one predicted at a position still masked.

    Args:
        commit: [R, B] bool, the masked positions that this step writes.
        threshold: [R], least confidence of a prediction.

    Returns:
        [R] int64 for `Decision.truncate_at`; -1 where the text does not end.
    """
    written = _first(commit & view.masked & view.is_eos)
    sure = view.confidence >= threshold[:, None]
    predicted = _first(view.masked & ~commit & view.is_eos & sure)
    return torch.where(written >= 0, written, predicted)


def _first(flags: torch.Tensor) -> torch.Tensor:
    places = torch.arange(flags.shape[1], device=flags.device)
    none = torch.full_like(places, flags.shape[1])
    first = torch.where(flags, places, none).amin(dim=1)
    return torch.where(first < flags.shape[1], first, -1)
