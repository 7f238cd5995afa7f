# SPDX-License-Identifier: Apache-2.0
"""Views: from the logits of a forward to what the strategies see of it.

The mask id is never predicted, unless `reference_exact` asks for it: its logit is
banned here, before anything is measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_dlm.kernels.draw import uniform
from vllm_dlm.kernels.token_stats import TokenStats, token_stats
from vllm_dlm.strategies.base import Branches, Probabilities, View

if TYPE_CHECKING:
    from vllm_dlm.model_executor.candidates import Candidates, Choice
    from vllm_dlm.model_executor.groups import StrategyGroups
    from vllm_dlm.model_executor.segments import BlockRows, SegmentPlan
    from vllm_dlm.model_executor.state import DlmModelState


class Views:
    """Builds the view of each step; see the module docstring."""

    def __init__(
        self, state: DlmModelState, groups: StrategyGroups, candidates: Candidates
    ) -> None:
        self.state = state
        self.groups = groups
        self.candidates = candidates

    def view(self, logits: torch.Tensor, plan: SegmentPlan) -> View:
        """Statistics of the active blocks, [R, B]; bans the mask id in `logits`."""
        state, slots = self.state, plan.slots
        output_positions = plan.positions - state.prompt_len[slots][:, None]
        # The prompt's last tokens may share the block: they stay.
        masks = self.masked(plan)
        decided = plan.valid & ~masks & (output_positions >= 0)

        needs = self.groups.needs(plan.slots_cpu)
        step = state.step[slots]
        # How many branches a forward has is chance: what is drawn must not show it.
        noise_step = torch.where(self.groups.drafts[slots], decided.sum(dim=1), step)
        positions = plan.positions.clamp(max=state.tokens.shape[1] - 1)
        masked = self._open(masks, slots) & plan.readable
        all_logits, logits = logits, logits[: len(plan.row_places)]
        stats, choice = self._measure(logits, masked, noise_step, plan, needs)
        branches = None
        if "branches" in needs:
            branches = self._branches(all_logits, masked, choice, noise_step, plan)
        noise = None
        if "uniform" in needs:
            noise = uniform(*self.candidates.noise_keys(step, plan)).view(masked.shape)
        probabilities = None
        if "probabilities" in needs:
            rows = torch.arange(len(logits), device=logits.device)
            rows = torch.where(plan.readable, plan.spread(rows), -1)
            probabilities = Probabilities(logits, stats.logsumexp, rows)
        written = output_positions[:, 0].clamp(min=0) + decided.sum(dim=1)
        longest = state.text_end[slots] - state.prompt_len[slots]

        tokens = state.tokens[slots[:, None], positions].long()
        # What was handed out stays, whatever the model thinks of it now.
        stays = decided & self.handed_out(plan)
        return View(
            tokens=tokens,
            masked=masked,
            valid=plan.valid,
            decided=decided,
            positions=output_positions,
            candidate=torch.where(stays, tokens, choice.candidate),
            confidence=choice.confidence,
            is_eos=self.candidates.is_stop(choice.candidate, plan),
            step=step,
            scheduled=self._scheduled(masked, step, slots),
            steps=state.steps_per_block[slots],
            progress=written / longest,
            state={},
            entropy=choice.entropy,
            margin=choice.margin,
            uniform=noise,
            probabilities=probabilities,
            branches=branches,
        )

    def _measure(
        self,
        logits: torch.Tensor,
        masked: torch.Tensor,
        noise_step: torch.Tensor,
        blocks: BlockRows,
        needs: set[str],
    ) -> tuple[TokenStats, Choice]:
        """Statistics of rows [N, V] and the blocks' candidates; bans the mask id."""
        mask_id = self.state.mask_id
        exact = self.state.exact[blocks.slots][blocks.row_requests]
        logits[:, mask_id] = torch.where(exact, logits[:, mask_id], -torch.inf)
        stats = token_stats(
            logits, need_entropy="entropy" in needs, need_margin="margin" in needs
        )
        choice = self.candidates.choose(logits, stats, masked, noise_step, blocks)
        return stats, choice

    def _branches(
        self,
        logits: torch.Tensor,
        masked: torch.Tensor,
        choice: Choice,
        noise_step: torch.Tensor,
        plan: SegmentPlan,
    ) -> Branches:
        """What the forward made of drafts, beside the canvas' own `choice`.

        Args:
            logits: [N, V]: rows of the canvases, those of branches behind them.
            masked: [R, B] bool: positions of the canvases that may be written.
        """
        tokens, rank = self.state.drafts.of(plan)
        masked, candidate = masked[:, None], choice.candidate[:, None]
        confidence = choice.confidence[:, None]
        layout = plan.branches
        if layout is not None:
            blocks = layout.blocks
            left = self.masked(plan)[layout.parents] & (
                rank[layout.parents] >= layout.numbers[:, None]
            )
            left = self._open(left, blocks.slots)
            step = noise_step[layout.parents] + layout.numbers
            rows = logits[len(plan.row_places) :]
            _, drafted = self._measure(rows, left, step, blocks, set())
            masked = layout.by_branch(masked[:, 0], left)
            masked &= (layout.index >= 0)[..., None]
            candidate = layout.by_branch(choice.candidate, drafted.candidate)
            confidence = layout.by_branch(choice.confidence, drafted.confidence)
        return Branches(tokens, rank, masked, candidate, confidence)

    def handed_out(self, plan: SegmentPlan) -> torch.Tensor:
        """[R, B] bool: what a client has: a prompt's tail, and a block's seed."""
        state, slots = self.state, plan.slots
        end = state.prompt_len[slots] + state.emitted[slots]
        return plan.positions < end[:, None]

    def masked(self, plan: SegmentPlan) -> torch.Tensor:
        """[R, B] bool: all masks of the active blocks."""
        # Positions past max_model_len do not exist in the state.
        positions = plan.positions.clamp(max=self.state.tokens.shape[1] - 1)
        return self.state.masked[plan.slots[:, None], positions] & plan.valid

    def _open(self, masked: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """[R, B] bool: of all masks of active blocks, the first sub-block with any."""
        offsets = torch.arange(masked.shape[1], device=masked.device)
        sub_block = offsets // self.state.sub_block_length[slots][:, None]
        first = torch.where(masked, sub_block, masked.shape[1]).amin(dim=1)
        return masked & (sub_block == first[:, None])

    def _scheduled(
        self, masked: torch.Tensor, step: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """[R] int64: tokens that the step schedule writes now, at least one."""
        state = self.state
        budget = state.steps_per_block[slots]
        if state.defaults.schedule == "rounded":
            left = (budget - step).clamp(min=1)
            # To even, as Python rounds: in float64 for exact halves.
            share = (masked.sum(dim=1).double() / left).round().long()
        else:
            # What a schedule divides: the block's masks or, in the references of
            # block-causal models, its length, also where a prompt fills a part of it.
            share = state.block_length[slots]
            if not state.defaults.reuses_blocks:
                share = torch.where(
                    step == 0, masked.sum(dim=1), state.block_masks[slots]
                )
                state.block_masks[slots] = share
            share = share // budget + (step < share % budget).long()
        return torch.where(step < budget, share, masked.shape[1]).clamp(min=1)
