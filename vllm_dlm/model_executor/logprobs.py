# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of the step that revealed a token.

Tokens are revealed out of order and handed out left to right, so what was measured at
the reveal is kept until the token is streamed. Raw logits, as vLLM's default
`raw_logprobs`: before temperature and restrictions. Only requests that asked pay.
A step map (`step_maps.py`) asks for the log-probability of the token alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.v1.outputs import LogprobsTensors

from vllm_dlm.model_executor.step_maps import COLUMNS, new_map, note_writes

if TYPE_CHECKING:
    from vllm_dlm.model_executor.safety import SafeDecision
    from vllm_dlm.model_executor.segments import SegmentPlan
    from vllm_dlm.model_executor.state import DlmModelState


class RevealedLogprobs:
    """Per request that asked for logprobs: ids, values and ranks by position."""

    def __init__(self, state: DlmModelState) -> None:
        self.state = state
        self._ids: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._ranks: dict[int, torch.Tensor] = {}
        self._step_maps: dict[int, torch.Tensor] = {}

    def add(self, slot: int) -> None:
        """Make room for a new request that asked for logprobs or a step map.

        Stored per slot: [max_model_len, k + 1] ids and values, column 0 the token's.
        """
        request = self.state.requests[slot]
        top = request.params.num_logprobs
        length, device = self.state.tokens.shape[1], self.state.device
        if request.config.step_map:
            self._step_maps[slot] = new_map(length, device)
            top = top or 0
        if top is None:
            return
        self._ids[slot] = torch.zeros(length, top + 1, dtype=torch.int32, device=device)
        self._values[slot] = torch.zeros(length, top + 1, device=device)
        self._ranks[slot] = torch.zeros(length, dtype=torch.int64, device=device)

    def remove(self, slot: int) -> None:
        """Drop what is kept for a request that has left."""
        for store in (self._ids, self._values, self._ranks, self._step_maps):
            store.pop(slot, None)

    def record(
        self,
        logits: torch.Tensor,
        step: torch.Tensor,
        decision: SafeDecision,
        plan: SegmentPlan,
    ) -> None:
        """Keep the log-probabilities of the tokens written in this step.

        Args:
            logits: [N, V], rows as `SegmentPlan.logits_rows` names them.
            step: [R] int64, the step of each request's block.
        """
        for row, slot in enumerate(plan.slots_cpu):
            if slot not in self._ids:
                continue
            written = decision.commit[row] | decision.edit[row]
            offsets = written.nonzero()[:, 0]
            tokens = decision.new_tokens[row, offsets]
            rows = plan.rows_at(row, offsets, decision.branch)
            scores = logits[rows].float().log_softmax(dim=1)
            chosen = scores.gather(1, tokens[:, None])
            top = self._ids[slot].shape[1] - 1
            best = scores.topk(top, dim=1)
            where = plan.positions[row, offsets]
            self._ids[slot][where] = torch.cat(
                [tokens[:, None], best.indices], dim=1
            ).int()
            self._values[slot][where] = torch.cat([chosen, best.values], dim=1)
            # As vLLM ranks: 1 for the best, ties count.
            self._ranks[slot][where] = (scores >= chosen).sum(dim=1)
            if slot in self._step_maps:
                # A predicted mask (reference_exact) writes nothing.
                where = where[tokens != self.state.mask_id]
                note_writes(self._step_maps[slot], where, step[row])

    def emit(
        self, old: torch.Tensor, new: torch.Tensor, plan: SegmentPlan
    ) -> LogprobsTensors | None:
        """Log-probabilities of output tokens [old, new) of each request.

        Returns None where no request of the batch asked. Where one wants a step map,
        the token ids are followed by its `COLUMNS`, and that request's tokens by the
        rest of its block: what stands behind the end of a text has shaped it too.
        """
        if not any(slot in self._ids for slot in plan.slots_cpu):
            return None
        columns = max(ids.shape[1] for ids in self._ids.values())
        mapped = any(slot in self._step_maps for slot in plan.slots_cpu)
        parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        offsets = [0]
        block_end = plan.positions[:, 0] + plan.valid.sum(dim=1)
        bounds = torch.stack(
            [old, new, block_end - self.state.prompt_len[plan.slots]], dim=1
        ).tolist()
        for slot, (begin, end, last) in zip(plan.slots_cpu, bounds, strict=True):
            count = 0
            if slot in self._step_maps:
                end = last
            if slot in self._ids:
                prompt_len = int(self.state.prompt_len[slot])
                span = slice(prompt_len + begin, prompt_len + end)
                missing = columns - self._ids[slot].shape[1]
                pad = (0, missing)
                ids = torch.nn.functional.pad(self._ids[slot][span], pad)
                if mapped:
                    step_map = self._step_maps.get(slot)
                    columns_behind = (
                        ids.new_zeros(len(ids), COLUMNS)
                        if step_map is None
                        else step_map[span]
                    )
                    ids = torch.cat([ids, columns_behind], dim=1)
                parts.append(
                    (
                        ids,
                        torch.nn.functional.pad(
                            self._values[slot][span], pad, value=-torch.inf
                        ),
                        self._ranks[slot][span],
                    )
                )
                count = end - begin
            offsets.append(offsets[-1] + count)
        return LogprobsTensors(
            logprob_token_ids=torch.cat([part[0] for part in parts]),
            logprobs=torch.cat([part[1] for part in parts]),
            selected_token_ranks=torch.cat([part[2] for part in parts]),
            cu_num_generated_tokens=offsets,
        )


def spread_logprobs(
    logprobs: LogprobsTensors | None, plan: SegmentPlan, num_reqs: int
) -> LogprobsTensors | None:
    """The same tokens, counted over the whole batch: who did not decide has none."""
    if logprobs is None:
        return None
    counts = torch.zeros(num_reqs + 1, dtype=torch.int64)
    offsets = torch.tensor(logprobs.cu_num_generated_tokens)
    counts[torch.tensor(plan.batch_rows) + 1] = offsets.diff()
    return logprobs._replace(cu_num_generated_tokens=counts.cumsum(0).tolist())
