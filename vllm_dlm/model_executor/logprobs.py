# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of the step that revealed a token.

Tokens are revealed out of order and handed out left to right, so what was measured at
the reveal is kept until the token is streamed. Raw logits, as vLLM's default
`raw_logprobs`: before temperature and restrictions. Only requests that asked pay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.v1.outputs import LogprobsTensors

if TYPE_CHECKING:
    from vllm_dlm.model_executor.segments import SegmentPlan
    from vllm_dlm.model_executor.state import DlmModelState
    from vllm_dlm.strategies.base import Decision, View


class RevealedLogprobs:
    """Per request that asked for logprobs: ids, values and ranks by position."""

    def __init__(self, state: DlmModelState) -> None:
        self.state = state
        self._ids: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._ranks: dict[int, torch.Tensor] = {}

    def add(self, slot: int) -> None:
        """Make room for a new request that asked for logprobs.

        Stored per slot: [max_model_len, k + 1] ids and values, column 0 the token's.
        """
        top = self.state.requests[slot].params.num_logprobs
        if top is None:
            return
        length, device = self.state.tokens.shape[1], self.state.device
        self._ids[slot] = torch.zeros(length, top + 1, dtype=torch.int32, device=device)
        self._values[slot] = torch.zeros(length, top + 1, device=device)
        self._ranks[slot] = torch.zeros(length, dtype=torch.int64, device=device)

    def remove(self, slot: int) -> None:
        """Drop what is kept for a request that has left."""
        for store in (self._ids, self._values, self._ranks):
            store.pop(slot, None)

    def record(
        self, logits: torch.Tensor, view: View, decision: Decision, plan: SegmentPlan
    ) -> None:
        """Keep the log-probabilities of the tokens written in this step."""
        for row, slot in enumerate(plan.slots_cpu):
            if slot not in self._ids:
                continue
            written = decision.commit[row]
            if decision.edit is not None:
                written = written | decision.edit[row]
            offsets = written.nonzero()[:, 0]
            tokens = (
                view.candidate if decision.new_tokens is None else decision.new_tokens
            )[row, offsets]
            rows = plan.row_bounds[row] + offsets
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

    def emit(
        self, old: torch.Tensor, new: torch.Tensor, plan: SegmentPlan
    ) -> LogprobsTensors | None:
        """Log-probabilities of output tokens [old, new) of each request.

        Returns None where no request of the batch asked.
        """
        if not any(slot in self._ids for slot in plan.slots_cpu):
            return None
        columns = max(ids.shape[1] for ids in self._ids.values())
        parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        offsets = [0]
        bounds = torch.stack([old, new], dim=1).tolist()
        for slot, (begin, end) in zip(plan.slots_cpu, bounds, strict=True):
            count = 0
            if slot in self._ids:
                prompt_len = int(self.state.prompt_len[slot])
                span = slice(prompt_len + begin, prompt_len + end)
                missing = columns - self._ids[slot].shape[1]
                pad = (0, missing)
                parts.append(
                    (
                        torch.nn.functional.pad(self._ids[slot][span], pad),
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
