# SPDX-License-Identifier: Apache-2.0
"""DenoisingSampler: the active blocks' rows in, final tokens out.

One step:

    rows -> lm_head -> statistics -> candidates             of all requests at once
         -> strategy -> safety -> canvas -> reply           group by group

The second half is one function of tensors (`step_function.py`), compiled for what a
server decodes by default. What the strategies see is made in `views.py`, what must hold
for all of them is in `safety.py`, and `advance.py` writes what was decided.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm import envs
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_dlm.kernels.mixtures import mixtures
from vllm_dlm.kernels.token_stats import token_stats
from vllm_dlm.model_executor.constrained import Constrained
from vllm_dlm.model_executor.frames import FrameTensors
from vllm_dlm.model_executor.reply import Reply
from vllm_dlm.model_executor.sampling.advance import Advance
from vllm_dlm.model_executor.sampling.candidates import Candidates
from vllm_dlm.model_executor.sampling.groups import StrategyGroups
from vllm_dlm.model_executor.sampling.logprobs import RevealedLogprobs
from vllm_dlm.model_executor.sampling.lookout import Lookout
from vllm_dlm.model_executor.sampling.observers import open_observers
from vllm_dlm.model_executor.sampling.rows import Mixing, Rows
from vllm_dlm.model_executor.sampling.safety import Safety
from vllm_dlm.model_executor.sampling.scheduled import Scheduled
from vllm_dlm.model_executor.sampling.soft_memory import MIXTURES
from vllm_dlm.model_executor.sampling.step_function import Asked, StepFunctions
from vllm_dlm.model_executor.sampling.views import Extras, Views

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.states import RequestState

    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.planning.block_rows import BlockRows
    from vllm_dlm.model_executor.planning.branches import GroupRows
    from vllm_dlm.model_executor.planning.guesses import Settled
    from vllm_dlm.model_executor.planning.step_plan import SegmentPlan
    from vllm_dlm.model_executor.sampling.groups import Group
    from vllm_dlm.model_executor.sampling.logits import Head, Logits
    from vllm_dlm.model_executor.sampling.step_function import StepFunction
    from vllm_dlm.model_executor.slots import RequestSlots


class DenoisingSampler:
    """Replaces vLLM's sampler for diffusion models; see the module docstring.

    Args:
        slots: the request table.
        facts: of the engine.
        head: lm_head.
        req_states: the runner's own count of each request's tokens.
        take_plan: gives, once, the plan of the forward just run; None after a dummy
            batch.
    """

    # What vLLM's runner reads off any sampler. No penalties: `post_update` takes None
    # for "no counts to keep".
    penalties_state = SimpleNamespace(output_bin_counts=None)
    compute_nans = False

    def __init__(
        self,
        slots: RequestSlots,
        facts: EngineFacts,
        head: Head,
        req_states: RequestState,
        take_plan: Callable[[], SegmentPlan | None],
    ) -> None:
        self.slots = slots
        self.facts = facts
        self.head = head
        self._take_plan = take_plan
        self.groups = StrategyGroups(slots, facts)
        self.candidates = Candidates(slots, facts)
        self.constrained = Constrained(slots, facts)
        self.rows = Rows(slots, facts, head, self.candidates)
        self.views = Views(slots, facts, self.candidates)
        self.safety = Safety(slots, facts, self.candidates)
        self.lookout = Lookout(slots, self.candidates)
        self.logprobs = RevealedLogprobs(slots, facts)
        self.advance = Advance(slots, facts, req_states.total_len.gpu)
        self.steps = StepFunctions(
            slots, facts, self.views, self.safety, self.advance, self.rows.choice
        )
        self.observers = open_observers(slots, facts)
        self._added: list[int] = []
        """Slots of requests that are new in this step."""

    # -- requests ----------------------------------------------------------

    def add_request(self, req_index: int, sampling_params: SamplingParams) -> None:
        """Called by the runner after `DlmModelState.add_request`."""
        self.groups.add(req_index)
        self.candidates.add(req_index)
        self.logprobs.add(req_index)
        self._added.append(req_index)

    def remove_request(self, slot: int) -> None:
        """Forget a request, whose columns and options can still be read."""
        for observer in self.observers.values():
            observer.remove(slot)
        self.candidates.remove(slot)
        self.constrained.remove(slot)
        self.logprobs.remove(slot)
        self.groups.remove(slot)

    def apply_staged_writes(self) -> None:
        """Write what new requests have brought, and tell the observers of them.

        Called by the runner in every step, once all its new requests were added.
        """
        self.slots.write_staged()
        for slot in self._added:
            # A list: all of them are told, whatever the first one answers.
            reads_block = [one.add(slot) for one in self.observers.values()]
            if any(reads_block):
                self.slots.host.read_whole_block(slot)
        self._added.clear()

    # -- one step ----------------------------------------------------------

    def settle(self, rows: BlockRows) -> Settled:
        """Complete the plan of a group with requests that run ahead (`guesses.py`)."""
        return self.steps.of(self.groups.of(rows)).settled(rows.packed)

    def __call__(self, hidden: torch.Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Decide one denoise step.

        Args:
            hidden: [N, H], rows as `SegmentPlan.logits_rows` names them, as the network
                leaves them: `DiffusionModelMixin.compute_logits` says why.
            input_batch: vLLM's batch.
        """
        plan = self._take_plan()
        if plan is None:
            self._rehearse(hidden)
        self.steps.compile(self.groups.expected)
        if plan is None or not plan.groups:
            return _nothing_sampled(input_batch.num_reqs, hidden.device)
        groups = [self.groups.of(rows) for rows in plan.groups]
        logits = self.rows.logits(hidden, plan)
        both = list(zip(groups, plan.groups, strict=True))
        scheduled = self._scheduled(both)
        self.constrained.prepare(plan, scheduled)
        others = [pair for pair in both if pair[1].first_row not in scheduled]
        self.rows.measure(
            logits,
            [
                drawn
                for _, rows in others
                if self.candidates.are_special(rows.slots_np)
                for drawn in self.views.drawn(rows)
            ],
            self.constrained,
            [
                Mixing(rows, group.memory[MIXTURES])
                for group, rows in others
                if MIXTURES in group.memory
            ],
            list(scheduled.values()),
            reads_best=any(
                self.candidates.read_best(rows.slots_np) for rows in plan.groups
            ),
        )
        self.constrained.choose(self.rows.choice)
        self.constrained.keep_means(logits, self.head)
        self.lookout.look(plan.lookout, self.rows.choice.part(slice(len(logits))))
        # Of all, also of requests that do not ask: who does is rare.
        before = self.slots.emitted.clone() if self.logprobs.asked(plan) else None
        width = max(rows.width for rows in plan.groups)
        most = self._most_handed(plan)
        reply = Reply.empty(input_batch.num_reqs, width, hidden.device, most)
        guessed = [rows.guessed for rows in plan.groups if rows.guessed is not None]
        for void in guessed:
            # Who is decided writes that anew.
            reply.counts[1, void.batch_rows] = void.in_vain
        frames = None
        if any(self.slots.host.is_watched[rows.slots_np].any() for rows in plan.groups):
            frames = FrameTensors.empty(input_batch.num_reqs, width, hidden.device)
        for group, rows in zip(groups, plan.groups, strict=True):
            # As the step finds them: it moves on.
            blocks = rows.blocks if frames is not None else None
            self._step(group, rows, logits, reply)
            if frames is not None and blocks is not None:
                frames.note(blocks, self.slots, self.rows.choice, reply.canvas_ends)
        self.constrained.after_step()
        again = logits.computed - sum(rows.num_rows for rows in plan.groups)
        again += sum(rows.num_rows for rows in guessed)
        if again:
            reply.counts[2, 0] += again
        logprobs = None
        if before is not None:
            logprobs = self.logprobs.emit(plan, before, input_batch.num_reqs)
        # When all groups are done: the host still has where the step began.
        slots = np.concatenate([rows.slots_np for rows in plan.groups])
        batch_rows = np.concatenate([rows.batch_rows_np for rows in plan.groups])
        known = ~self.slots.host.runs_ahead[slots]
        if known.any():
            self.slots.host.send(
                slots[known], batch_rows[known], reply.counts[3:], reply.masked
            )
        return reply.for_runner(logprobs, envs.VLLM_COMPUTE_NANS_IN_LOGITS, frames)

    def _scheduled(self, groups: list[tuple[Group, GroupRows]]) -> dict[int, Scheduled]:
        """The blocks whose strategies set the temperature, by their first row."""
        scheduled = {}
        for group, rows in groups:
            temperature = group.temperature(self.slots, rows.blocks)
            if temperature is not None:
                own = self.views.drawn(rows)[0]
                memory = group.memory.get(MIXTURES)
                scheduled[rows.first_row] = Scheduled(*own, temperature, memory)
        return scheduled

    def _most_handed(self, plan: SegmentPlan) -> int:
        """Tokens that this step hands out at most, if more than a block."""
        if self.slots.pins is None:
            return 0
        widths = self.slots.host.reply_width
        return max(int(widths[rows.slots_np].max()) for rows in plan.groups)

    def _step(
        self, group: Group, rows: GroupRows, logits: Logits, reply: Reply
    ) -> None:
        """Decide and write a group's blocks, and their rows of the reply."""
        function = self.steps.of(group)
        if function.compiled is not None and not self._asks_the_host(rows):
            function.compiled(rows.packed, self.rows.choice, reply)
        else:
            self._step_by_step(function, rows, logits, reply)

    def _asks_the_host(self, rows: GroupRows) -> bool:
        """Whether the step of a group is more than tensors in, tensors out."""
        return (
            self.logprobs.asked_by(rows)
            or bool(self.slots.host.growing(rows.slots_np).any())
            or bool(self.slots.host.has_canvas[rows.slots_np].any())
            or self.candidates.restricted.have_bad_words(rows.slots_np)
            or self.candidates.stop_ids.are_many(rows.slots_np)
            or any(one.watches(rows.slots_np) for one in self.observers.values())
        )

    def _step_by_step(
        self, function: StepFunction, rows: GroupRows, logits: Logits, reply: Reply
    ) -> None:
        """The same step, with what the host has to do in between."""
        blocks, choice, slots = rows.blocks, self.rows.choice, rows.slots_np
        needs, host = function.group.strategy.needs, self.slots.host
        asked = Asked(
            eotp=bool(host.predicts_end[slots].any()),
            opening=bool(host.opens_alone[slots].any()),
            growth=bool(host.growing(slots).any()),
            elastic=bool(host.is_elastic[slots[0]]),
        )
        extras = Extras(
            self.constrained.probabilities(logits, choice.logsumexp, rows)
            if "probabilities" in needs
            else None,
            self.views.branches(rows, choice) if "branches" in needs else None,
        )
        measured, decision = function.decide(blocks, choice, extras, asked)
        view = measured.view
        if self.candidates.restricted.have_bad_words(slots):
            self.safety.veto_bad_words(view, decision, rows)
        self.logprobs.record(logits, view.step, decision, rows)
        decision, canvas = function.write(measured, decision, blocks, asked)
        watching = [one for one in self.observers.values() if one.watches(slots)]
        if watching:
            self.advance.show_end(canvas, blocks)
            unknown = canvas.open | ~canvas.exists | measured.broken[:, None]
            written = torch.where(unknown, -1, canvas.tokens)
            for observer in watching:
                observer.after_step(view, decision, written, rows)
        function.move_on(measured, decision, canvas, blocks, reply)

    def _rehearse(self, hidden: torch.Tensor) -> None:
        """Compute a full tile, while vLLM measures how much memory a step takes."""
        rows = min(self.facts.tile_rows, self.facts.max_num_tokens)
        logits = self.head.logits(hidden.new_zeros(rows, hidden.shape[1]))
        token_stats(logits, need_entropy=True, need_margin=True)
        if self.facts.soft_inputs:
            if self.facts.defaults.noise == "uniform":
                # Divided by the strategy's temperature (`scheduled.py`).
                logits = logits.to(torch.float32, copy=True)
            mixtures(logits, self.head, self.head.vocab_shard)
        self.constrained.rehearse(logits[:1])


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
