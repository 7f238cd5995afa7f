# SPDX-License-Identifier: Apache-2.0
"""Views: what the strategies see of a group's blocks.

Tensors in, tensors out: `view` is a part of the compiled step (`step_function.py`).
What only some strategies ask for, and no compiled step holds, is made before it:
`Extras`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_dlm.model_executor.sampling.rows import Drawn
from vllm_dlm.strategies.base import Branches, View, in_branch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_dlm.model_executor.columns import Requests
    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.planning.block_rows import Blocks
    from vllm_dlm.model_executor.planning.branches import BranchBlocks, GroupRows
    from vllm_dlm.model_executor.sampling.candidates import Candidates
    from vllm_dlm.model_executor.sampling.choice import Choice
    from vllm_dlm.model_executor.slots import RequestSlots
    from vllm_dlm.strategies.probabilities import Probabilities


class Measured(NamedTuple):
    """The active blocks as a step finds them."""

    view: View
    """What the strategies see."""
    block_masks: torch.Tensor | None
    """[R] int64: masks that each block began with; None where no schedule asks."""
    broken: torch.Tensor
    """[R] bool: logits that leave no token to choose somewhere in the block."""


class Extras(NamedTuple):
    """What a view holds for few strategies."""

    probabilities: Probabilities | None = None
    branches: Branches | None = None


class Views:
    """Builds the view of each step; see the module docstring."""

    def __init__(
        self, slots: RequestSlots, facts: EngineFacts, candidates: Candidates
    ) -> None:
        self.slots = slots
        self.facts = facts
        self.candidates = candidates

    def view(
        self,
        blocks: Blocks,
        choice: Choice,
        needs: frozenset[str],
        state: Mapping[str, torch.Tensor],
        extras: Extras,
    ) -> Measured:
        """What the strategy of a group sees.

        Args:
            choice: of the step's rows.
            needs: what the strategy reads beyond the confidence.
            state: what it remembers of each block.
        """
        table, requests = self.slots, blocks.requests
        output_positions = blocks.positions - requests.prompt_len[:, None]
        # The prompt's last tokens may share the block: they stay.
        masks = table.masks(blocks)
        decided = blocks.valid & ~masks & (output_positions >= 0)
        step = requests.step
        open_ = self._open(masks, blocks)
        masked = open_ & blocks.readable
        # A schedule divides masks that a cache policy leaves for later steps, too.
        shared = masked if self.facts.defaults.reuses_blocks else open_
        written = output_positions[:, 0].clamp(min=0) + decided.sum(dim=1)
        longest = requests.text_end - requests.prompt_len
        block_masks = self._block_masks(shared, requests)

        chosen = choice.at(blocks, needs)
        tokens = table.tokens[blocks.slots[:, None], blocks.places].long()
        # Some stays, whatever the model thinks of it now.
        stays = (decided & table.is_fixed(blocks)) | ~blocks.has_row
        candidate = torch.where(stays, tokens, chosen.candidate)
        view = View(
            tokens=tokens,
            masked=masked,
            valid=blocks.valid,
            decided=decided,
            positions=output_positions,
            candidate=candidate,
            confidence=chosen.confidence,
            is_eos=self.candidates.is_stop(candidate, blocks),
            step=step,
            scheduled=self._scheduled(shared, block_masks, requests),
            steps=requests.steps_per_block,
            progress=written / longest,
            state=state,
            entropy=chosen.entropy if "entropy" in needs else None,
            margin=chosen.margin if "margin" in needs else None,
            uniform=self.candidates.noise(step, blocks) if "uniform" in needs else None,
            noise=self.candidates.random_tokens(step, blocks)
            if "noise" in needs
            else None,
            other=chosen.other if "other" in needs else None,
            best=torch.where(stays, tokens, chosen.best) if "best" in needs else None,
            best_confidence=chosen.best_confidence if "best" in needs else None,
            probabilities=extras.probabilities,
            branches=extras.branches,
            num_masks=shared.sum(dim=1),
        )
        return Measured(view, block_masks, chosen.broken.any(dim=1))

    def drawn(self, rows: GroupRows) -> list[Drawn]:
        """A group's blocks, and those of its branches, for rows that are drawn."""
        blocks, table = rows.blocks, self.slots
        masks = table.masks(blocks)
        # How many branches a forward has is chance: what is drawn must not show it.
        decided = blocks.valid & ~masks
        decided &= blocks.positions >= blocks.requests.prompt_len[:, None]
        step = torch.where(
            blocks.requests.has_branches,
            _written(decided, masks, blocks),
            blocks.requests.step,
        )
        masked = self._open(masks, blocks) & blocks.readable
        drawn = [Drawn(rows, masked, step)]
        if rows.branches is not None:
            layout = rows.branches
            left, branches = self._left(rows, layout), layout.rows.blocks
            steps = step[layout.parents] + layout.numbers
            if self._looks_ahead(rows):
                written = decided[layout.parents] | (masks[layout.parents] & ~left)
                steps = _written(written, left, branches)
            drawn.append(Drawn(layout.rows, self._open(left, branches), steps))
        return drawn

    def branches(self, rows: GroupRows, choice: Choice) -> Branches:
        """What the forward made of drafts, beside the canvas itself.

        Args:
            choice: of the step's rows.
        """
        blocks, table = rows.blocks, self.slots
        tokens, rank = table.drafts.of(blocks)
        own = choice.at(blocks)
        masks = table.masks(blocks)
        canvas = self._open(masks, blocks) & blocks.readable
        masks = (masks & blocks.readable)[:, None]
        masked, candidate = canvas[:, None], own.candidate[:, None]
        confidence = own.confidence[:, None]
        layout = rows.branches
        if layout is not None:
            left = self._left(rows, layout)
            drafted = choice.at(layout.rows.blocks)
            # Drafts that break the logits were not evaluated: if they are right, the
            # canvas will have them, and break.
            left &= ~drafted.broken.any(dim=1, keepdim=True)
            exists = (layout.index >= 0)[..., None]
            masks = layout.by_branch(masks[:, 0], left) & exists
            masked = layout.by_branch(canvas, self._open(left, layout.rows.blocks))
            masked &= exists
            candidate = layout.by_branch(own.candidate, drafted.candidate)
            confidence = layout.by_branch(own.confidence, drafted.confidence)
        branches = Branches(tokens, rank, masked, candidate, confidence)
        if not self._looks_ahead(rows):
            return branches
        return replace(branches, later=masks & ~masked, part=self._parts(blocks))

    def _looks_ahead(self, rows: GroupRows) -> bool:
        """Whether a group decides more than its requests' active blocks."""
        return rows.width > int(self.slots.host.block_length[rows.slots_np[0]])

    def _left(self, rows: GroupRows, layout: BranchBlocks) -> torch.Tensor:
        """[E, B] bool: masks that branches leave."""
        _, rank = self.slots.drafts.of(rows.blocks)
        drafted = in_branch(rank[layout.parents], layout.numbers[:, None])
        return self.slots.masks(rows.blocks)[layout.parents] & ~drafted

    def _parts(self, blocks: Blocks) -> torch.Tensor:
        """[R, B] int64: the sub-block of each position, counted from the left."""
        offsets = torch.arange(blocks.width, device=blocks.slots.device)
        parts: torch.Tensor = offsets // blocks.requests.sub_block_length[:, None]
        return parts

    def _open(self, masked: torch.Tensor, blocks: Blocks) -> torch.Tensor:
        """[R, B] bool: of all masks of active blocks, the first sub-block with any."""
        sub_block = self._parts(blocks)
        first = torch.where(masked, sub_block, blocks.width).amin(dim=1)
        return masked & (sub_block == first[:, None])

    def _block_masks(
        self, masked: torch.Tensor, requests: Requests
    ) -> torch.Tensor | None:
        """[R] int64: masks that each block began with, where a schedule divides them.

        In the references of models that decode block after block it divides the block's
        length, also where a prompt fills a part of it.
        """
        defaults = self.facts.defaults
        if defaults.schedule == "rounded" or defaults.reuses_blocks:
            return None
        return torch.where(requests.step == 0, masked.sum(dim=1), requests.block_masks)

    def _scheduled(
        self,
        masked: torch.Tensor,
        block_masks: torch.Tensor | None,
        requests: Requests,
    ) -> torch.Tensor:
        """[R] int64: tokens that the step schedule writes now, at least one."""
        budget, step = requests.steps_per_block, requests.step
        if self.facts.defaults.schedule == "rounded":
            left = (budget - step).clamp(min=1)
            # To even, as Python rounds: in float64 for exact halves.
            share = (masked.sum(dim=1).double() / left).round().long()
        else:
            whole = requests.block_length if block_masks is None else block_masks
            share = whole // budget + (step < whole % budget).long()
        # An opening takes the place of step 0, and its share is left to the last step.
        last = budget - requests.opens_alone.long()
        return torch.where(step < last, share, masked.shape[1]).clamp(min=1)


def _written(
    decided: torch.Tensor, masked: torch.Tensor, blocks: Blocks
) -> torch.Tensor:
    """[R] int64: tokens of the block that holds the first mask, of those decided.

    Args:
        decided, masked: [R, B] bool.
    """
    offsets = torch.arange(blocks.width, device=masked.device)
    block = offsets // blocks.requests.block_length[:, None]
    first = torch.where(masked, block, blocks.width).amin(dim=1, keepdim=True)
    return (decided & (block == first)).sum(dim=1)
