# SPDX-License-Identifier: Apache-2.0
"""DenoisingSampler: the active blocks' rows in, final tokens out.

One step, for all requests of the batch at once:

    rows -> lm_head -> statistics -> candidates -> strategy -> safety -> canvas -> reply

What the strategies see is made in `views.py`, what must hold for all of them is in
`safety.py`, and `advance.py` writes what was decided.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from vllm import envs
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_dlm.kernels.token_stats import token_stats
from vllm_dlm.model_executor.reply import put_health
from vllm_dlm.model_executor.sampling.advance import Advance
from vllm_dlm.model_executor.sampling.candidates import Candidates
from vllm_dlm.model_executor.sampling.groups import StrategyGroups
from vllm_dlm.model_executor.sampling.logprobs import RevealedLogprobs, spread_logprobs
from vllm_dlm.model_executor.sampling.observers import open_observers
from vllm_dlm.model_executor.sampling.opening import opened
from vllm_dlm.model_executor.sampling.safety import Safety
from vllm_dlm.model_executor.sampling.views import Views

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.states import RequestState

    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.planning.step_plan import SegmentPlan
    from vllm_dlm.model_executor.sampling.logits import Head
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
        self.views = Views(slots, facts, head, self.candidates)
        self.safety = Safety(slots, facts, self.candidates)
        self.logprobs = RevealedLogprobs(slots, facts)
        self.advance = Advance(slots, facts, req_states, self.logprobs)
        self.observers = open_observers(slots, facts)
        self._added: list[int] = []
        """Slots of requests that are new in this step."""
        # A place in the reply that our models do not need, unless one looks for NaNs.
        self._counts_rows = not envs.VLLM_COMPUTE_NANS_IN_LOGITS

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
        if plan is None or not len(plan.slots_np):
            return _nothing_sampled(input_batch.num_reqs, hidden.device)
        logits = self.views.logits(hidden, plan)
        measured = self.views.measure(logits, plan, self.groups.needs(plan.slots_np))
        view, broken = measured.view, measured.broken
        decided = self.groups.select(view, plan)
        if self.slots.host.opens_alone[plan.slots_np].any():
            decided = opened(view, decided, self.slots.opens_alone[plan.slots])
        decision = self.safety.hold_to_rules(view, decided, plan)
        self.logprobs.record(logits, view.step, decision, plan)
        canvas = self.advance.write_canvas(view, decision, plan)
        if self.observers:
            unknown = canvas.open | ~canvas.exists | broken[:, None]
            written = torch.where(unknown, -1, canvas.tokens)
            for observer in self.observers.values():
                observer.after_step(view, decision, written, plan)
        output = self.advance.move_on(measured, decision, canvas, plan)
        put_health(output, broken, logits.computed if self._counts_rows else None)
        return _for_batch(output, plan, input_batch.num_reqs)

    def _rehearse(self, hidden: torch.Tensor) -> None:
        """Compute a full tile, while vLLM measures how much memory a step takes."""
        rows = min(self.facts.tile_rows, self.facts.max_num_tokens)
        logits = self.head.logits(hidden.new_zeros(rows, hidden.shape[1]))
        token_stats(logits, need_entropy=True, need_margin=True)


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
