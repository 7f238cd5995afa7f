# SPDX-License-Identifier: Apache-2.0
"""The opening of a block, as published code decodes Dream with caches.

Where a position is predicted by the row to its left, a block's first token comes from a
row outside of it. That code computes this row in the forwards alone that refresh the
keys, of which a block has one or more: such a step writes the first mask from it,
however sure, and nothing else. What the strategy has for the step is not written; it
goes on with the next. A strategy that drafts (FreeDave, arXiv 2510.00294) has all
other masks drafted then. Sources: the code for Dream of Fast-dLLM (arXiv 2505.22618)
and of Window-Diffusion (2601.20332); with `reference_exact`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vllm_dlm.model_executor.layout import refreshes
from vllm_dlm.strategies.base import NOT_DRAFTED, Decision, View, best_of, ranks

if TYPE_CHECKING:
    from vllm_dlm.model_executor.columns import Requests


def opened(view: View, decision: Decision, requests: Requests) -> Decision:
    """The decision, but for blocks that this step opens: their first mask alone.

    Args:
        view: what was decided on.
        requests: of the view.
    """
    is_first = requests.block_start <= requests.prompt_len
    is_refresh = refreshes(requests.reach, view.step, is_first, requests.phase)
    opens = (requests.opens_alone & is_refresh)[:, None]
    places = torch.arange(view.masked.shape[1], device=view.masked.device)
    first = best_of(view.masked, -places.expand_as(view.masked))

    def unless_opening(marks: torch.Tensor | None) -> torch.Tensor | None:
        return None if marks is None else marks & ~opens

    drafts, rank = decision.draft_tokens, decision.draft_rank
    if drafts is not None and rank is not None:
        left = view.masked & ~first
        by_confidence = torch.where(left, ranks(left, view.confidence), NOT_DRAFTED)
        drafts = torch.where(opens, view.candidate, drafts)
        rank = torch.where(opens, by_confidence, rank)

    soft = decision.soft
    if soft is not None:
        soft = soft._replace(where=soft.where & ~opens)

    return replace(
        decision,
        commit=torch.where(opens, first, decision.commit),
        new_tokens=None
        if decision.new_tokens is None
        else torch.where(opens, view.candidate, decision.new_tokens),
        edit=unless_opening(decision.edit),
        remask=unless_opening(decision.remask),
        draft_tokens=drafts,
        draft_rank=rank,
        soft=soft,
    )
