# SPDX-License-Identifier: Apache-2.0
"""Safety: what holds for every strategy, whatever it decides.

Only open masks are written, what was emitted never changes, every block makes progress
and every block ends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from vllm_dlm.config.cache import FAR
from vllm_dlm.model_executor.sampling.eotp import MODES, canvas_cut, end_of_text
from vllm_dlm.model_executor.sampling.growth import Ends, expansion_of, with_block
from vllm_dlm.strategies.base import Decision, Soft, View, best_masked

if TYPE_CHECKING:
    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.planning.block_rows import BlockRows, Blocks
    from vllm_dlm.model_executor.sampling.candidates import Candidates
    from vllm_dlm.model_executor.slots import RequestSlots


@dataclass(kw_only=True)
class SafeDecision(Decision):
    """A decision held to the rules of decoding: what others may leave out is there."""

    new_tokens: torch.Tensor
    edit: torch.Tensor
    remask: torch.Tensor
    hold: torch.Tensor
    keeps_masks: torch.Tensor
    """[R] bool: the block ends, and what is masked in it is text."""
    canvas_end: torch.Tensor | None = None
    """[R] int64: where the canvas ends that grows, 0 for one that does not."""

    def steps(self) -> torch.Tensor | int:
        """[R] int64: steps of the block that this forward has done."""
        steps: torch.Tensor | int = 1
        if self.step_ahead is not None:
            steps = 1 + torch.where(self.commit, self.step_ahead, 0).amax(dim=1)
        if self.canvas_end is not None:
            steps = torch.where(self.canvas_end > 0, 0, steps)
        return steps


class Safety:
    """Holds decisions to the rules of decoding; see the module docstring."""

    def __init__(
        self, slots: RequestSlots, facts: EngineFacts, candidates: Candidates
    ) -> None:
        self.slots = slots
        self.facts = facts
        self.candidates = candidates

    def hold_to_rules(
        self, view: View, decision: Decision, blocks: Blocks
    ) -> SafeDecision:
        """The part of a strategy's decision that the rules allow, and what they add."""
        table, mask_id = self.slots, self.facts.mask_id
        rewrites = blocks.requests.may_rewrite[:, None]
        open_ = view.masked
        if view.branches is not None:
            # In the course of its branches a request may reach the next sub-block.
            open_ = view.branches.masked.any(dim=1)
        commit = decision.commit & open_
        may_change = view.decided & rewrites & ~table.is_fixed(blocks)
        edit = may_change & _or_false(decision.edit, commit)
        remask = may_change & ~edit & _or_false(decision.remask, commit)
        new_tokens = (
            view.candidate if decision.new_tokens is None else decision.new_tokens
        )

        # Progress: a step that writes nothing would be repeated for ever.
        stalled = commit.sum(dim=1) <= remask.sum(dim=1)
        if decision.idle is not None:
            # But a block's lead is written: without it no rows are left to compute.
            stalled = stalled & (blocks.leads | ~decision.idle)
        commit = commit | (best_masked(view) & stalled[:, None])
        # A block ends.
        last, keeps_masks = (ends[:, None] for ends in table.ending(blocks))
        new_tokens = torch.where(keeps_masks & ~commit, mask_id, new_tokens)
        # A further sub-block, whose rows were not read, ends in the next step.
        rest = view.masks & ((blocks.readable & blocks.has_row) | keeps_masks)
        if view.branches is not None:
            # Of what is decided along with the block, it alone ends.
            offsets = torch.arange(blocks.width, device=rest.device)
            last_here = last & (offsets < blocks.requests.block_length[:, None])
        else:
            last_here = last
        commit = torch.where(last_here, rest, commit)
        edit, remask = edit & ~last, remask & ~last
        # An edit may choose the mask id (`reference_exact`): so it is in LLaDA2.1's.
        to_mask = edit & (new_tokens == mask_id)
        edit, remask = edit & ~to_mask, remask | to_mask
        return SafeDecision(
            commit=commit,
            new_tokens=new_tokens,
            edit=edit,
            remask=remask,
            hold=_or_false(decision.hold, stalled) & ~last[:, 0],
            keeps_masks=keeps_masks[:, 0],
            truncate_at=decision.truncate_at,
            branch=decision.branch,
            step_ahead=decision.step_ahead,
            draft_tokens=decision.draft_tokens,
            draft_rank=decision.draft_rank,
            soft=self._soft(view, decision.soft, blocks),
            held=decision.held,
            settled=decision.settled,
        )

    def _soft(self, view: View, soft: Soft | None, blocks: Blocks) -> Soft | None:
        """What may be soft: no prompt, nothing that a client has written or been sent,
        and no mixture of logits that were not read."""
        if soft is None:
            return None
        allowed = blocks.valid & (view.positions >= 0) & ~self.slots.is_fixed(blocks)
        if soft.ids is None:
            allowed = allowed & blocks.has_row
        return soft._replace(where=soft.where & allowed)

    def veto_bad_words(
        self, view: View, decision: SafeDecision, rows: BlockRows
    ) -> None:
        """Change a decision's rows, in place, that would write a bad word.

        A row that would gain no token then writes its most confident candidate alone:
        by itself, a candidate completes no bad word.

        Args:
            decision: held to all other rules: what came after might write a bad word.
        """
        commit, edit, new_tokens = decision.commit, decision.edit, decision.new_tokens
        before = commit | edit if decision.soft is not None else None
        for row in self.candidates.restricted.veto_bad_words(
            commit, edit, new_tokens, rows
        ):
            if commit[row].sum() <= decision.remask[row].sum():
                commit[row] = best_masked(view)[row]
                edit[row] = decision.remask[row] = False
                new_tokens[row] = view.candidate[row]
        if decision.soft is not None and before is not None:
            # What was not written after all is hard.
            kept = decision.soft.where & ~(before & ~(commit | edit))
            decision.soft = decision.soft._replace(where=kept)

    def grow(self, view: View, decision: SafeDecision, blocks: Blocks) -> SafeDecision:
        """The decision; where a canvas grows, one that writes and cuts nothing."""
        requests, table = blocks.requests, self.slots
        expansion, window, threshold = (
            column[blocks.slots]
            for column in (
                table.growth_expansion,
                table.growth_window,
                table.growth_threshold,
            )
        )
        ends = with_block(
            Ends(*table.lookout_counts[blocks.slots].unbind(1)),
            view.masked & view.is_eos,
            view.confidence,
            view.masked,
            window,
        )
        lacks = expansion_of(ends, expansion, window, threshold)
        # `eotp=canvas` leaves no more than the end: where it sees one, that is enough.
        sure = view.confidence >= requests.eotp_threshold[:, None]
        has_end = (view.masked & view.is_eos & sure).any(dim=1)
        has_end |= table.lookout_end[blocks.slots] < FAR
        looks = requests.eotp == MODES.index("canvas")
        # In whole blocks; no wider than a canvas may be, nor than the longest text.
        begin, length = requests.block_start, requests.block_length
        wanted = -(-(blocks.canvas_end + lacks - begin) // length) * length
        widest = max(self.facts.max_canvas, blocks.width) // length * length
        end = torch.minimum(begin + torch.minimum(wanted, widest), requests.text_end)
        grows = (lacks > 0) & (requests.step == 0) & (end > blocks.canvas_end)
        grows &= ~(looks & has_end)
        stays = ~grows[:, None]
        return replace(
            decision,
            commit=decision.commit & stays,
            edit=decision.edit & stays,
            remask=decision.remask & stays,
            canvas_end=torch.where(grows, end, 0),
        )

    def cut(self, view: View, decision: SafeDecision, blocks: Blocks) -> SafeDecision:
        """The decision, with the end that the option `eotp` gives its canvases."""
        requests = blocks.requests
        is_end = self.candidates.is_stop(decision.new_tokens, blocks)
        write = decision.commit | decision.edit
        cut = canvas_cut(
            end_of_text(view, write, is_end, requests.eotp_threshold),
            self.slots.lookout_end[blocks.slots] - requests.block_start,
            requests.eotp,
            requests.may_rewrite,
            requests.block_length,
            decision.truncate_at,
        )
        if decision.canvas_end is not None:
            cut = torch.where(decision.canvas_end > 0, -1, cut)
        return replace(decision, truncate_at=cut)


def _or_false(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if mask is None else mask
