# SPDX-License-Identifier: Apache-2.0
"""The opening of a block, as Fast-dLLM's code decodes Dream with its caches.

Where a position is predicted by the row to its left, a block's first token comes from a
row outside of it. That loop computes this row in the block's first forward alone, which
refreshes the keys: it writes the first token from it, however sure, and nothing else.
What the strategy has for the block's step 0 is not written; it goes on with step 1.
A strategy that drafts (FreeDave, arXiv 2510.00294) has all other masks drafted then.
Source: NVlabs/Fast-dLLM's code for Dream (arXiv 2505.22618); with `reference_exact`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm_dlm.strategies.base import NOT_DRAFTED, Decision, View, best_of, ranks


def opened(view: View, decision: Decision, opens_alone: torch.Tensor) -> Decision:
    """The decision, but for blocks that this step opens: their first mask alone.

    Args:
        view: what was decided on.
        opens_alone: [R] bool: requests whose blocks are opened so.
    """
    opens = (opens_alone & (view.step == 0))[:, None]
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
    )
