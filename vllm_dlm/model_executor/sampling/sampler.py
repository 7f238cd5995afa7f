# SPDX-License-Identifier: Apache-2.0
"""DenoisingSampler: the active blocks' rows in, final tokens out.

One step, for all requests of the batch at once:

    rows -> lm_head -> statistics -> candidates -> strategy -> safety -> canvas -> reply

What the strategies see is made in `views.py`, what must hold for all of them is in
`safety.py`; a cut canvas stays cut here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from vllm import envs
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_dlm.config.cache import FAR, Reach
from vllm_dlm.kernels.token_stats import token_stats
from vllm_dlm.model_executor.host_slots import BLOCK
from vllm_dlm.model_executor.layout import next_start, part_start
from vllm_dlm.model_executor.reply import put_canvas_end, put_health
from vllm_dlm.model_executor.sampling.candidates import Candidates
from vllm_dlm.model_executor.sampling.groups import StrategyGroups, rows_read_by
from vllm_dlm.model_executor.sampling.logprobs import RevealedLogprobs, spread_logprobs
from vllm_dlm.model_executor.sampling.observers import open_observers
from vllm_dlm.model_executor.sampling.opening import opened
from vllm_dlm.model_executor.sampling.safety import SafeDecision, Safety
from vllm_dlm.model_executor.sampling.views import Views

if TYPE_CHECKING:
    from vllm_dlm.model_executor.planning.step_plan import SegmentPlan
    from vllm_dlm.model_executor.state import DlmModelState
    from vllm_dlm.strategies.base import View


class Canvas(NamedTuple):
    """The active blocks [R, B] as a step leaves them."""

    tokens: torch.Tensor
    """[R, B] int64."""
    exists: torch.Tensor
    """[R, B] bool: of the block, and left of the canvas's end."""
    open: torch.Tensor
    """[R, B] bool: masked still."""
    end: torch.Tensor
    """[R] int64: where each canvas ends."""


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
        self.safety = Safety(state, self.groups, self.candidates, self.views)
        self.logprobs = RevealedLogprobs(state)
        self.observers = open_observers(state)
        # A place in the reply that our models do not need, unless one looks for NaNs.
        self._counts_rows = not envs.VLLM_COMPUTE_NANS_IN_LOGITS
        state.on_remove = self._forget

    def _forget(self, slot: int) -> None:
        for observer in self.observers.values():
            observer.remove(slot)
        self.candidates.remove(slot)
        self.logprobs.remove(slot)
        self.groups.remove(slot)

    def add_request(self, req_index: int, sampling_params: Any) -> None:
        """Called by the runner after `DlmModelState.add_request`."""
        self.groups.add(req_index)
        self.candidates.add(req_index)
        self.logprobs.add(req_index)
        # A list: all of them are told, whatever the first one answers.
        reads_block = [one.add(req_index) for one in self.observers.values()]
        strategy = self.groups.strategy_of(req_index)
        reads = BLOCK if any(reads_block) else rows_read_by(strategy)
        self.state.host.reads[req_index] = reads

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    # -- one step ----------------------------------------------------------

    def __call__(self, hidden: torch.Tensor, input_batch: Any) -> SamplerOutput:
        """Decide one denoise step.

        Args:
            hidden: [N, H], rows as `SegmentPlan.logits_rows` names them, as the network
                leaves them: `DiffusionModelMixin.compute_logits` says why.
            input_batch: vLLM's batch.
        """
        plan = self.state.take_plan()
        if plan is None:
            self._rehearse(hidden)
        if plan is None or not len(plan.slots_np):
            return _nothing_sampled(input_batch.num_reqs, hidden.device)
        logits = self.views.logits(hidden, plan)
        view, broken = self.views.view(logits, plan)
        decided = self.groups.select(view, plan)
        if self.state.host.opens_alone[plan.slots_np].any():
            decided = opened(view, decided, self.state.opens_alone[plan.slots])
        decision = self.safety.hold_to_rules(view, decided, plan)
        self.logprobs.record(logits, view.step, decision, plan)
        output = self._advance(view, decision, broken, plan)
        put_health(output, broken, logits.computed if self._counts_rows else None)
        return _for_batch(output, plan, input_batch.num_reqs)

    def _rehearse(self, hidden: torch.Tensor) -> None:
        """A full tile, while vLLM measures how much memory a step takes."""
        rows = min(self.state.tile_rows, self.state.max_num_tokens)
        logits = self.state.model.logits(hidden.new_zeros(rows, hidden.shape[1]))
        token_stats(logits, need_entropy=True, need_margin=True)

    def _advance(
        self,
        view: View,
        decision: SafeDecision,
        broken: torch.Tensor,
        plan: SegmentPlan,
    ) -> SamplerOutput:
        """Write the decision to the canvas and tell runner and scheduler.

        Args:
            broken: [R] bool: of requests that end with this step, in an error.
        """
        canvas = self._write_canvas(view, decision, plan)
        if self.observers:
            unknown = canvas.open | ~canvas.exists | broken[:, None]
            written = torch.where(unknown, -1, canvas.tokens)
            for observer in self.observers.values():
                observer.after_step(view, decision, written, plan)
        frontier = self._move_on(view, decision, canvas, plan)
        return self._reply(frontier, canvas.end, plan)

    def _write_canvas(
        self, view: View, decision: SafeDecision, plan: SegmentPlan
    ) -> Canvas:
        """Tokens, masks, and what is left of the canvas."""
        state, slots = self.state, plan.slots
        commit, new_tokens = decision.commit, decision.new_tokens
        # A predicted mask (reference_exact) stays masked until the block ends.
        stays = commit & (new_tokens == state.mask_id) & ~decision.keeps_masks[:, None]
        tokens = torch.where(commit | decision.edit, new_tokens, view.tokens)
        tokens = torch.where(decision.remask, state.mask_id, tokens)
        masked = (view.masks & ~commit) | stays | decision.remask
        plan.cells.write(state.tokens, tokens)
        plan.cells.write(state.masked, masked)

        # What lies right of a cut no longer exists.
        end = plan.canvas_end
        if decision.truncate_at is not None:
            cut = decision.truncate_at
            cut_end = torch.where(cut >= 0, plan.positions[:, 0] + cut + 1, end)
            end = torch.minimum(end, cut_end)
            state.canvas_end[slots] = end
        exists = view.valid & (plan.positions < end[:, None])
        return Canvas(tokens, exists, masked & exists, end)

    def _move_on(
        self, view: View, decision: SafeDecision, canvas: Canvas, plan: SegmentPlan
    ) -> torch.Tensor:
        """Go on in the block, or to the next one.

        Returns:
            [R] int64: the first position that is not final.
        """
        state, slots, open_ = self.state, plan.slots, canvas.open
        if decision.draft_rank is not None:
            state.drafts.keep(decision, open_, plan.cells)
        block_start = plan.positions[:, 0]
        block_end = block_start + canvas.exists.sum(dim=1)
        offsets = torch.arange(open_.shape[1], device=open_.device)
        first_open = torch.where(open_, offsets, open_.shape[1]).amin(dim=1)
        done = ~open_.any(dim=1) & ~decision.hold
        frontier = torch.minimum(block_start + first_open, block_end)
        # What may be rewritten, and what is held, is not final before its block is.
        waits = self.groups.may_rewrite[slots] | decision.hold | self._lacks_seed(plan)
        # A seed goes out at once: by it a replay knows that there was one.
        frontier = torch.where(waits & ~done & ~plan.seeds, block_start, frontier)
        next_block = torch.where(done, block_end, block_start)
        state.block_start[slots] = next_block
        state.step[slots] = torch.where(done, 0, view.step + decision.steps())
        self._tell_host(next_block, canvas.end, plan)
        return frontier

    def _lacks_seed(self, plan: SegmentPlan) -> torch.Tensor:
        """[R] bool: blocks whose seed was the mask id (`reference_exact`).

        A replay would take the first token of such a block for its seed, so none is
        handed out before the block is over. But where a step computes a sub-block, by
        what was handed out the scheduler knows which.
        """
        state, slots = self.state, plan.slots
        block_start, prompt_len = plan.positions[:, 0], state.prompt_len[slots]
        has_seed = prompt_len + state.emitted[slots] > block_start
        is_whole = state.reach[slots, Reach._fields.index("part")] == FAR
        begins = state.defaults.begins_with_seed(block_start, prompt_len)
        return begins & ~has_seed & is_whole

    def _reply(
        self, frontier: torch.Tensor, canvas_end: torch.Tensor, plan: SegmentPlan
    ) -> SamplerOutput:
        """Tokens that became final, then where the canvas ends.

        Args:
            frontier, canvas_end: [R] int64, positions.
        """
        state, slots = self.state, plan.slots
        prompt_len, old = state.prompt_len[slots], state.emitted[slots]
        # vLLM has counted the last step's canvas end as a token: a step each, that
        # would run past its row of token ids.
        self.req_states.total_len.gpu[slots] = (prompt_len + old).to(torch.int32)
        new = torch.maximum(old, frontier - prompt_len)
        state.emitted[slots] = new
        reach = torch.arange(plan.positions.shape[1] + 1, device=slots.device)
        source = (prompt_len + old)[:, None] + reach
        source = source.clamp(max=state.tokens.shape[1] - 1)
        sampled, num_sampled = put_canvas_end(
            state.tokens[slots[:, None], source].long(),
            new - old,
            canvas_end,
            # Said of a full canvas only if it was cut just now: vLLM also writes this
            # number into its row of token ids, which may end with the canvas.
            says_end=prompt_len + new < plan.canvas_end,
        )
        return SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=self.logprobs.emit(old, new, plan),
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=(plan.rows_ends - self._next_start(frontier, plan)).int(),
        )

    def _tell_host(
        self, block_start: torch.Tensor, canvas_end: torch.Tensor, plan: SegmentPlan
    ) -> None:
        """Send what the next forward's rows follow from (`planning.py`)."""
        state = self.state
        offsets = torch.arange(plan.positions.shape[1], device=block_start.device)
        positions = block_start[:, None] + offsets
        positions = positions.clamp(max=state.masked.shape[1] - 1)
        masked = state.masked[plan.slots[:, None], positions]
        state.host.send(plan.slots_np, block_start, canvas_end, masked)

    def _next_start(self, frontier: torch.Tensor, plan: SegmentPlan) -> torch.Tensor:
        """[R] int64: where the next forward of each request starts.

        The scheduler's rule (`CanvasRequest.next_rows`), for the runner's own count.

        Args:
            frontier: [R] int64, first position that is not final now.
        """
        state, slots = self.state, plan.slots
        reach = Reach(*state.reach[slots].unbind(dim=1))
        prompt_len, step = state.prompt_len[slots], state.step[slots]
        block_start = state.block_start[slots]
        # In a replay, less is final than was handed out (`emitted`).
        before = state.frontier[slots]
        state.frontier[slots] = now = torch.maximum(before, frontier)
        start: torch.Tensor
        if state.defaults.reuses_blocks:
            # A finished block's KV is not final yet.
            decided = plan.positions[:, 0]
            begins = step <= state.defaults.begins_with_seed(decided, prompt_len)
            is_whole = begins | (block_start != decided)
            now = torch.where(is_whole, decided, torch.maximum(now, prompt_len))
            start = part_start(reach, decided, now)
        else:
            is_first = block_start <= prompt_len
            start = next_start(reach, step, is_first, block_start, before)
        return start


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
    if len(plan.slots_np) == num_reqs:
        return output
    device = output.num_sampled.device
    rows = torch.from_numpy(plan.batch_rows_np).to(device, non_blocking=True)

    def spread(values: torch.Tensor) -> torch.Tensor:
        whole = values.new_zeros(num_reqs, *values.shape[1:])
        whole[rows] = values
        return whole

    return SamplerOutput(
        sampled_token_ids=spread(output.sampled_token_ids),
        logprobs_tensors=spread_logprobs(output.logprobs_tensors, plan, num_reqs),
        num_nans=None if output.num_nans is None else spread(output.num_nans),
        num_sampled=spread(output.num_sampled),
        num_rejected=spread(output.num_rejected),
    )
