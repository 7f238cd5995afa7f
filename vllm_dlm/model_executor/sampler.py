# SPDX-License-Identifier: Apache-2.0
"""DenoisingSampler: logits of the active blocks in, final tokens out.

One step, for all requests of the batch at once:

    rows -> statistics -> candidates -> strategy decides -> safety -> canvas -> reply

The strategies say which positions to write; everything that must hold for all of them
is here: every block makes progress, every block ends, a cut canvas stays cut, what was
streamed never changes. What they see is made in `views.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_dlm.model_executor.cache import POLICIES
from vllm_dlm.model_executor.candidates import Candidates
from vllm_dlm.model_executor.eotp import canvas_cut, end_of_text
from vllm_dlm.model_executor.groups import StrategyGroups
from vllm_dlm.model_executor.learning import Learning
from vllm_dlm.model_executor.logprobs import RevealedLogprobs, spread_logprobs
from vllm_dlm.model_executor.views import Views
from vllm_dlm.strategies.base import Decision, View, best_masked
from vllm_dlm.trajectories import open_log

if TYPE_CHECKING:
    from vllm_dlm.model_executor.segments import SegmentPlan
    from vllm_dlm.model_executor.state import DlmModelState


@dataclass
class SafeDecision(Decision):
    """A decision held to the rules of decoding: what others may leave out is there."""

    new_tokens: torch.Tensor
    edit: torch.Tensor
    remask: torch.Tensor
    hold: torch.Tensor


class DenoisingSampler:
    """Replaces vLLM's sampler for diffusion models; see the module docstring."""

    # What vLLM's runner reads off any sampler. No penalties: `post_update` takes None
    # for "no counts to keep".
    penalties_state = SimpleNamespace(output_bin_counts=None)
    compute_nans = False

    def __init__(self, state: DlmModelState, req_states: Any) -> None:
        self.state = state
        self.req_states = req_states
        self.groups = StrategyGroups(state)
        self.candidates = Candidates(state)
        self.views = Views(state, self.groups, self.candidates)
        self.logprobs = RevealedLogprobs(state)
        self.learning = Learning(state, self.groups)
        self.trajectories = open_log(state)
        state.on_remove = self._forget

    def _forget(self, slot: int) -> None:
        self.learning.remove(slot)
        self.logprobs.remove(slot)
        self.groups.remove(slot)

    def add_request(self, req_index: int, sampling_params: Any) -> None:
        """Called by the runner after `DlmModelState.add_request`."""
        self.groups.add(req_index)
        self.candidates.add(req_index)
        self.logprobs.add(req_index)
        self.learning.add(req_index)
        if self.trajectories is not None:
            self.trajectories.add(req_index)

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    # -- one step ----------------------------------------------------------

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> SamplerOutput:
        """Decide one denoise step.

        Args:
            logits: [N, V], rows as `SegmentPlan.logits_rows` names them.
            input_batch: vLLM's batch, for the query lengths.
        """
        plan = self.state.take_plan()
        if plan is None or not plan.slots_cpu:
            return _nothing_sampled(input_batch.num_reqs, logits.device)
        view = self.views.view(logits, plan)
        self.learning.observe(view, plan)
        decision = self._safe(view, self.groups.select(view, plan), plan)
        self.logprobs.record(logits, view.step, decision, plan)
        output = self._advance(view, decision, plan)
        if self.trajectories is not None:
            self.trajectories.record(view.step, decision, plan)
        return _for_batch(output, plan, input_batch.num_reqs)

    def _safe(self, view: View, decision: Decision, plan: SegmentPlan) -> SafeDecision:
        """Hold any strategy to the rules of decoding."""
        state, slots = self.state, plan.slots
        rewrites = self.groups.may_rewrite[slots][:, None]
        open_ = view.masked
        if view.branches is not None:
            # In the course of its branches a request may reach the next sub-block.
            open_ = view.branches.masked.any(dim=1)
        commit = decision.commit & open_
        may_change = view.decided & rewrites & ~self.views.handed_out(plan)
        edit = may_change & _or_false(decision.edit, commit)
        remask = may_change & ~edit & _or_false(decision.remask, commit)
        new_tokens = (
            view.candidate if decision.new_tokens is None else decision.new_tokens
        )
        self.candidates.veto_bad_words(commit, edit, new_tokens, plan)

        # Progress: a step that writes nothing would be repeated for ever.
        stalled = commit.sum(dim=1) <= remask.sum(dim=1)
        if decision.idle is not None:
            # Not of a block's seed: without it no rows are left to compute.
            stalled = stalled & (plan.seeds | ~decision.idle)
        commit = commit | (best_masked(view) & stalled[:, None])
        # A block ends.
        limit = self.groups.step_limit[slots]
        exact_limit = torch.minimum(limit, state.steps_per_block[slots])
        limit = torch.where(state.exact[slots], exact_limit, limit)
        last = (view.step + 1 >= limit)[:, None]
        # The references' schedule ends with masks where masks were predicted.
        left = state.exact[slots][:, None] & last & ~commit
        new_tokens = torch.where(left, state.mask_id, new_tokens)
        commit = torch.where(last, view.masks & plan.readable, commit)
        return SafeDecision(
            commit=commit,
            new_tokens=new_tokens,
            edit=edit & ~last,
            remask=remask & ~last,
            hold=_or_false(decision.hold, stalled) & ~last[:, 0],
            truncate_at=self._cut(view, commit | edit, new_tokens, decision, plan),
            branch=decision.branch,
            draft_tokens=decision.draft_tokens,
            draft_rank=decision.draft_rank,
        )

    def _cut(
        self,
        view: View,
        write: torch.Tensor,
        new_tokens: torch.Tensor,
        decision: Decision,
        plan: SegmentPlan,
    ) -> torch.Tensor | None:
        """Where the canvas ends now: `Decision.truncate_at`."""
        state, slots = self.state, plan.slots
        if all(state.requests[slot].config.eotp == "off" for slot in plan.slots_cpu):
            return decision.truncate_at
        is_end = self.candidates.is_stop(new_tokens, plan)
        return canvas_cut(
            end_of_text(view, write, is_end, state.eotp_threshold[slots]),
            state.eotp[slots],
            self.groups.may_rewrite[slots],
            state.block_length[slots],
            decision.truncate_at,
        )

    def _advance(
        self, view: View, decision: SafeDecision, plan: SegmentPlan
    ) -> SamplerOutput:
        """Write the decision to the canvas and tell runner and scheduler."""
        state, slots = self.state, plan.slots
        commit, hold = decision.commit, decision.hold
        edit, remask, new_tokens = decision.edit, decision.remask, decision.new_tokens
        block_start = plan.positions[:, 0]

        # Canvas. A predicted mask (reference_exact) stays masked until the block ends.
        last = (view.step + 1 >= state.steps_per_block[slots])[:, None]
        stays = commit & (new_tokens == state.mask_id) & ~last
        write = commit | edit
        tokens = torch.where(write, new_tokens, view.tokens)
        tokens = torch.where(remask, state.mask_id, tokens)
        masked = (view.masks & ~commit) | stays | remask

        # Truncation: what lies right of the cut no longer exists.
        uncut_end = canvas_end = state.canvas_end[slots]
        if decision.truncate_at is not None:
            cut = decision.truncate_at
            cut_end = torch.where(cut >= 0, block_start + cut + 1, canvas_end)
            canvas_end = torch.minimum(canvas_end, cut_end)
            state.canvas_end[slots] = canvas_end
        exists = view.valid & (plan.positions < canvas_end[:, None])
        rows = slots[:, None].expand_as(plan.positions)[view.valid]
        where = plan.positions[view.valid]
        state.tokens[rows, where] = tokens[view.valid].to(state.tokens.dtype)
        state.masked[rows, where] = masked[view.valid]

        # Progress of the block.
        open_ = masked & exists
        if decision.draft_rank is not None:
            state.drafts.keep(decision, open_, plan)
        block_end = block_start + exists.sum(dim=1)
        offsets = torch.arange(open_.shape[1], device=open_.device)
        first_open = torch.where(open_, offsets, open_.shape[1]).amin(dim=1)
        done = ~open_.any(dim=1) & ~hold
        frontier = torch.minimum(block_start + first_open, block_end)
        # What may be rewritten, and what is held, is not final before its block is.
        waits = (self.groups.may_rewrite[slots] | hold) & ~done
        # A seed goes out at once: by it the scheduler knows that there was one.
        frontier = torch.where(waits & ~plan.seeds, block_start, frontier)
        self.learning.finish(done, plan)
        next_block = torch.where(done, block_end, block_start)
        state.block_start[slots] = next_block
        state.step[slots] = torch.where(done, 0, view.step + 1)

        # The reply: tokens that became final, then where the canvas ends.
        old = state.emitted[slots]
        # vLLM has counted the last step's canvas end as a token: a step each, that
        # would run past its row of token ids.
        total_len = state.prompt_len[slots] + old
        self.req_states.total_len.gpu[slots] = total_len.to(torch.int32)
        new = torch.maximum(old, frontier - state.prompt_len[slots])
        state.emitted[slots] = new
        count = new - old
        width = plan.positions.shape[1]
        reach = torch.arange(width + 1, device=slots.device)
        source = (state.prompt_len[slots] + old)[:, None] + reach
        sampled = state.tokens[
            slots[:, None], source.clamp(max=state.tokens.shape[1] - 1)
        ].long()
        # Said of a full canvas only if it was cut just now: vLLM also writes this
        # number into its row of token ids, which may end with the canvas.
        says_end = state.prompt_len[slots] + new < uncut_end
        at_end = (reach == count[:, None]) & says_end[:, None]
        sampled = torch.where(at_end, -(canvas_end[:, None] + 1), sampled)
        num_sampled = (count + says_end.long()).to(torch.int32)

        return SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=self.logprobs.emit(old, new, plan),
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=(plan.rows_ends - self._next_start(done, plan)).int(),
        )

    def _next_start(self, done: torch.Tensor, plan: SegmentPlan) -> torch.Tensor:
        """[R] int64: where the next forward of each request starts.

        The scheduler's rule (`CanvasRequest.next_rows`), for the runner's own count.
        """
        state, block_start = self.state, plan.positions[:, 0]
        if state.defaults.reuses_blocks:
            return block_start
        keeps = ~done & (state.policy[plan.slots] != POLICIES.index("none"))
        left = (block_start - state.defaults.shift).clamp(min=0)
        return torch.where(keeps, left, 0)


def _or_false(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if mask is None else mask


def _nothing_sampled(num_reqs: int, device: torch.device) -> SamplerOutput:
    """Reply to a dummy batch of vLLM's profiling, or to parts of prompts."""
    zeros = torch.zeros(num_reqs, dtype=torch.int32, device=device)
    return SamplerOutput(
        sampled_token_ids=zeros[:, None],
        logprobs_tensors=None,
        num_nans=None,
        num_sampled=zeros,
        num_rejected=zeros,
    )


def _for_batch(
    output: SamplerOutput, plan: SegmentPlan, num_reqs: int
) -> SamplerOutput:
    """The deciding requests' output as rows of the whole batch."""
    if len(plan.slots_cpu) == num_reqs:
        return output
    rows = torch.tensor(plan.batch_rows, device=output.num_sampled.device)

    def spread(values: torch.Tensor) -> torch.Tensor:
        whole = values.new_zeros(num_reqs, *values.shape[1:])
        whole[rows] = values
        return whole

    return SamplerOutput(
        sampled_token_ids=spread(output.sampled_token_ids),
        logprobs_tensors=spread_logprobs(output.logprobs_tensors, plan, num_reqs),
        num_nans=None,
        num_sampled=spread(output.num_sampled),
        num_rejected=spread(output.num_rejected),
    )
