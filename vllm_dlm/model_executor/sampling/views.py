# SPDX-License-Identifier: Apache-2.0
"""Views: from the logits of a forward to what the strategies see of it.

The mask id is never predicted, unless `reference_exact` asks for it. Logits come a tile
at a time (`logits.py`); what stays of a tile is one candidate and its statistics per
row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_dlm.kernels.draw import uniform
from vllm_dlm.kernels.token_stats import token_stats
from vllm_dlm.model_executor.sampling.choice import Choice, Tile
from vllm_dlm.model_executor.sampling.logits import Head, Logits
from vllm_dlm.strategies.base import Branches, View
from vllm_dlm.strategies.probabilities import Probabilities

if TYPE_CHECKING:
    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.planning.block_rows import BlockRows
    from vllm_dlm.model_executor.planning.step_plan import SegmentPlan
    from vllm_dlm.model_executor.sampling.candidates import Candidates
    from vllm_dlm.model_executor.slots import RequestSlots


class Measured(NamedTuple):
    """The active blocks as a step finds them."""

    view: View
    """What the strategies see."""
    block_masks: torch.Tensor | None
    """[R] int64: masks that each block began with; None where no schedule asks."""
    broken: torch.Tensor
    """[R] bool: logits that leave no token to choose somewhere in the block."""


class Views:
    """Builds the view of each step; see the module docstring."""

    def __init__(
        self,
        slots: RequestSlots,
        facts: EngineFacts,
        head: Head,
        candidates: Candidates,
    ) -> None:
        self.slots = slots
        self.facts = facts
        self.head = head
        self.candidates = candidates

    def logits(self, hidden: torch.Tensor, plan: SegmentPlan) -> Logits:
        """The step's logits, of branches' rows too.

        Args:
            hidden: [N, H], rows as `SegmentPlan.logits_rows` names them, behind them
                those of branches.
        """
        table, requests = self.slots, plan.row_request
        if plan.branches is not None:
            layout = plan.branches
            of_branches = layout.parents[layout.blocks.row_request]
            requests = torch.cat([requests, of_branches])
        # A block that ends by no schedule is filled with tokens.
        ends, keeps_masks = table.ending(plan.slots)
        may_predict_mask = table.exact[plan.slots] & (keeps_masks | ~ends)
        return Logits(
            self.head,
            hidden,
            self.facts.tile_rows,
            self.facts.mask_id,
            may_predict_mask[requests],
        )

    def measure(self, logits: Logits, plan: SegmentPlan, needs: set[str]) -> Measured:
        """Measure the active blocks.

        Args:
            needs: statistics that any of the requests' strategies reads.
        """
        table, slots = self.slots, plan.slots
        output_positions = plan.positions - table.prompt_len[slots][:, None]
        # The prompt's last tokens may share the block: they stay.
        masks = table.masks(plan)
        decided = plan.valid & ~masks & (output_positions >= 0)

        step = table.step[slots]
        # How many branches a forward has is chance: what is drawn must not show it.
        noise_step = torch.where(table.has_branches[slots], decided.sum(dim=1), step)
        positions = plan.positions.clamp(max=table.length - 1)
        masked = self._open(masks, slots) & plan.readable
        choice = self._choose(logits, 0, masked, noise_step, plan, needs)
        branches = None
        if "branches" in needs:
            branches = self._branches(logits, masked, choice, noise_step, plan)
        noise = None
        if "uniform" in needs:
            noise = uniform(*self.candidates.noise_keys(step, plan)).view(masked.shape)
        probabilities = None
        if "probabilities" in needs:
            probabilities = Probabilities(logits, choice.logsumexp, plan.row_at_np)
        written = output_positions[:, 0].clamp(min=0) + decided.sum(dim=1)
        longest = table.text_end[slots] - table.prompt_len[slots]
        block_masks = self._block_masks(masked, step, slots)

        tokens = table.tokens[slots[:, None], positions].long()
        # What was emitted stays, whatever the model thinks of it now.
        stays = (decided & table.is_emitted(plan)) | ~plan.has_row
        candidate = torch.where(stays, tokens, choice.candidate)
        view = View(
            tokens=tokens,
            masked=masked,
            valid=plan.valid,
            decided=decided,
            positions=output_positions,
            candidate=candidate,
            confidence=choice.confidence,
            is_eos=self.candidates.is_stop(candidate, plan),
            step=step,
            scheduled=self._scheduled(masked, step, block_masks, slots),
            steps=table.steps_per_block[slots],
            progress=written / longest,
            state={},
            entropy=choice.entropy,
            margin=choice.margin,
            uniform=noise,
            probabilities=probabilities,
            branches=branches,
        )
        return Measured(view, block_masks, choice.broken.any(dim=1))

    def _choose(
        self,
        logits: Logits,
        first: int,
        masked: torch.Tensor,
        noise_step: torch.Tensor,
        blocks: BlockRows,
        needs: set[str],
    ) -> Choice:
        """The blocks' candidates and their statistics.

        Args:
            logits: of all rows of the step.
            first: the first of the blocks' N rows among these.
        """
        places = masked.flatten()[blocks.row_places]
        parts = [Choice.of_nothing(logits.device, needs)]
        for rows, values in logits.tiles(first, first + len(places)):
            stats = token_stats(
                values,
                need_entropy="entropy" in needs,
                need_margin="margin" in needs,
                banned=logits.banned[rows],
                ban_id=logits.mask_id,
                shard=logits.shard,
            )
            own = slice(rows.start - first, rows.stop - first)
            tile = Tile(logits, values, rows, own, blocks, places[own], noise_step)
            parts.append(self.candidates.choose(tile, stats))
        return Choice.joined(parts).spread(blocks)

    def _branches(
        self,
        logits: Logits,
        masked: torch.Tensor,
        choice: Choice,
        noise_step: torch.Tensor,
        plan: SegmentPlan,
    ) -> Branches:
        """What the forward made of drafts, beside the canvas' own `choice`.

        Args:
            logits: rows of the canvases, those of branches behind them.
            masked: [R, B] bool: positions of the canvases that may be written.
        """
        tokens, rank = self.slots.drafts.of(plan)
        masked, candidate = masked[:, None], choice.candidate[:, None]
        confidence = choice.confidence[:, None]
        layout = plan.branches
        if layout is not None:
            blocks = layout.blocks
            left = self.slots.masks(plan)[layout.parents] & (
                rank[layout.parents] >= layout.numbers[:, None]
            )
            left = self._open(left, blocks.slots)
            step = noise_step[layout.parents] + layout.numbers
            own_rows = len(plan.row_places)
            drafted = self._choose(logits, own_rows, left, step, blocks, set())
            # Drafts that break the logits were not evaluated: if they are right, the
            # canvas will have them, and break.
            left &= ~drafted.broken.any(dim=1, keepdim=True)
            masked = layout.by_branch(masked[:, 0], left)
            masked &= (layout.index >= 0)[..., None]
            candidate = layout.by_branch(choice.candidate, drafted.candidate)
            confidence = layout.by_branch(choice.confidence, drafted.confidence)
        return Branches(tokens, rank, masked, candidate, confidence)

    def _open(self, masked: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """[R, B] bool: of all masks of active blocks, the first sub-block with any."""
        offsets = torch.arange(masked.shape[1], device=masked.device)
        sub_block = offsets // self.slots.sub_block_length[slots][:, None]
        first = torch.where(masked, sub_block, masked.shape[1]).amin(dim=1)
        return masked & (sub_block == first[:, None])

    def _block_masks(
        self, masked: torch.Tensor, step: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor | None:
        """[R] int64: masks that each block began with, where a schedule divides them.

        In the references of models that decode block after block it divides the block's
        length, also where a prompt fills a part of it.
        """
        defaults = self.facts.defaults
        if defaults.schedule == "rounded" or defaults.reuses_blocks:
            return None
        before = self.slots.block_masks[slots]
        return torch.where(step == 0, masked.sum(dim=1), before)

    def _scheduled(
        self,
        masked: torch.Tensor,
        step: torch.Tensor,
        block_masks: torch.Tensor | None,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """[R] int64: tokens that the step schedule writes now, at least one."""
        table = self.slots
        budget = table.steps_per_block[slots]
        if self.facts.defaults.schedule == "rounded":
            left = (budget - step).clamp(min=1)
            # To even, as Python rounds: in float64 for exact halves.
            share = (masked.sum(dim=1).double() / left).round().long()
        else:
            whole = table.block_length[slots] if block_masks is None else block_masks
            share = whole // budget + (step < whole % budget).long()
        # An opening takes the place of step 0, and its share is left to the last step.
        last = budget - table.opens_alone[slots].long()
        return torch.where(step < last, share, masked.shape[1]).clamp(min=1)
