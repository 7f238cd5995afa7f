# SPDX-License-Identifier: Apache-2.0
"""Drafts: the tokens that strategies have drafted for the next forward, by slot.

A forward evaluates them in branches, beside the canvas (`planning/branches.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_dlm.strategies.base import NOT_DRAFTED, Decision, in_branch

if TYPE_CHECKING:
    from vllm_dlm.model_executor.planning.block_rows import Blocks


class Drafts:
    """Draft tokens of all requests, by slot; see the module docstring.

    Args:
        shape: [slots + 1, positions], as the request table's.
        mask_id: is no draft.
        device: the engine's.
    """

    def __init__(self, shape: torch.Size, mask_id: int, device: torch.device) -> None:
        self._mask_id = mask_id
        self._tokens = torch.zeros(shape, dtype=torch.int32, device=device)
        self._rank = torch.full(shape, NOT_DRAFTED, dtype=torch.int32, device=device)

    def forget(self, slot: int) -> None:
        """Make room for a new request."""
        self._rank[slot] = NOT_DRAFTED

    def keep(self, decision: Decision, masked: torch.Tensor, blocks: Blocks) -> None:
        """Keep a decision's drafts for the next forward.

        A drafted mask id (`reference_exact`) fills nothing: verifying ends before it.

        Args:
            masked: [R, B] bool: positions that may be drafted.
        """
        assert decision.draft_tokens is not None and decision.draft_rank is not None
        masked = masked & (decision.draft_tokens != self._mask_id)
        rank = torch.where(masked, decision.draft_rank, NOT_DRAFTED)
        blocks.write(self._rank, rank)
        blocks.write(self._tokens, decision.draft_tokens)

    def written(
        self,
        tokens: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        branch: torch.Tensor,
    ) -> torch.Tensor:
        """[M] int32: the tokens of rows, with the drafts that their branches have.

        Args:
            tokens, slots, positions, branch: [M], of each row.
        """
        is_draft = in_branch(self._rank[slots, positions], branch)
        return torch.where(is_draft, self._tokens[slots, positions], tokens)

    def at(self, slots: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
        """Draft tokens and ranks at any positions, in the shape of both, int32."""
        return [self._tokens[slots, positions], self._rank[slots, positions]]

    def of(self, blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft tokens and ranks of active blocks, both [R, B] int64."""
        where = blocks.slots[:, None], blocks.places
        rank = torch.where(blocks.valid, self._rank[where], NOT_DRAFTED)
        return self._tokens[where].long(), rank.long()
