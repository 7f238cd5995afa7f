# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of the step that revealed a token.

Tokens are revealed out of order and emitted left to right, so what was measured at the
reveal is kept until the token is emitted. Raw logits, as vLLM's default
`raw_logprobs`: before temperature and restrictions. Only requests that asked pay.
A step map (`step_maps.py`) asks for the log-probability of the token alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors

from vllm_dlm.kernels.top_logprobs import top_logprobs
from vllm_dlm.model_executor.planning.block_rows import upload
from vllm_dlm.model_executor.planning.segments import ragged
from vllm_dlm.model_executor.step_maps import COLUMNS, NOT_WRITTEN, note_writes

if TYPE_CHECKING:
    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.layout import RequestLayout
    from vllm_dlm.model_executor.planning.branches import GroupRows
    from vllm_dlm.model_executor.planning.step_plan import SegmentPlan
    from vllm_dlm.model_executor.sampling.logits import Logits
    from vllm_dlm.model_executor.sampling.safety import SafeDecision
    from vllm_dlm.model_executor.slots import RequestSlots


class RevealedLogprobs:
    """Ids, values and ranks by position, of requests that asked for logprobs.

    Each has a seat in tensors that grow with the number of such requests at a time.
    """

    def __init__(self, slots: RequestSlots, facts: EngineFacts) -> None:
        self.slots = slots
        self.facts = facts
        self._seat = np.full(slots.num_slots, -1)
        """[slots]: -1 for requests that did not ask."""
        self._top = np.zeros(slots.num_slots, dtype=np.int64)
        """[slots]: how many tokens they want besides the chosen one."""
        self._maps = np.zeros(slots.num_slots, dtype=bool)
        """[slots]: whether they want a step map."""
        self._make_seats()

    def _make_seats(self) -> None:
        """Begin without seats: what nobody asks for takes no memory."""
        length, device = self.slots.length, self.slots.device
        self._free = list[int]()

        def seats(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(0, length, *shape, dtype=dtype, device=device)

        # [seats, max_model_len, k + 1]: column 0 is the token's own.
        self._ids = seats(1, dtype=torch.int32)
        self._values = seats(1, dtype=torch.float32)
        self._ranks = seats(dtype=torch.int64)
        self._step_maps = seats(COLUMNS, dtype=torch.int32)

    def add(self, slot: int) -> None:
        """Make room for a new request that asked for logprobs or a step map."""
        request = self.slots.requests[slot]
        top = request.params.num_logprobs
        if request.config.step_map:
            top = top or 0
        if top is None:
            return
        if not self._free:
            self._add_seats()
        self._widen(top + 1)
        seat = self._seat[slot] = self._free.pop()
        self._top[slot], self._maps[slot] = top, request.config.step_map
        if request.config.step_map:
            self._step_maps[seat] = torch.tensor(NOT_WRITTEN, dtype=torch.int32)
        if request.layout.canvas is not None:
            self._note_written(int(seat), request.layout)

    def _note_written(self, seat: int, layout: RequestLayout) -> None:
        """What a request has written itself is certain: it has the log-probability 0,
        and no token competes with it."""
        canvas, first = layout.canvas, layout.prompt_len
        assert canvas is not None
        (at,) = (~canvas.is_hole).nonzero()
        written = np.array(canvas.tokens, dtype=np.int64)[at]
        positions, tokens = upload(self.slots.device, first + at, written)
        self._ids[seat, positions] = tokens[:, None].int()
        self._values[seat, positions] = 0
        self._ranks[seat, positions] = 0

    def remove(self, slot: int) -> None:
        """Drop what is kept for a request that has left."""
        if self._seat[slot] >= 0:
            self._free.append(int(self._seat[slot]))
            self._seat[slot] = -1
            if len(self._free) == len(self._ids):
                self._make_seats()

    def _add_seats(self) -> None:
        """Double the number of seats."""
        have = len(self._ids)
        more = max(have, 1)
        self._ids, self._values, self._ranks, self._step_maps = (
            torch.cat([store, store.new_zeros(more, *store.shape[1:])])
            for store in (self._ids, self._values, self._ranks, self._step_maps)
        )
        self._free += range(have, have + more)

    def _widen(self, columns: int) -> None:
        missing = columns - self._ids.shape[2]
        if missing > 0:
            self._ids = torch.nn.functional.pad(self._ids, (0, missing))
            self._values = torch.nn.functional.pad(self._values, (0, missing))

    def asked(self, plan: SegmentPlan) -> bool:
        """Whether any request that decides in a forward wants some."""
        return any(self.asked_by(rows) for rows in plan.groups)

    def asked_by(self, rows: GroupRows) -> bool:
        """Whether any request of a group wants some."""
        return bool((self._seat[rows.slots_np] >= 0).any())

    def record(
        self,
        logits: Logits,
        step: torch.Tensor,
        decision: SafeDecision,
        rows: GroupRows,
    ) -> None:
        """Keep the log-probabilities of the tokens that a group writes in this step.

        Args:
            logits: of the step's rows.
            step: [R] int64, the step of each request's block.
        """
        (asking,) = (self._seat[rows.slots_np] >= 0).nonzero()
        if not len(asking):
            return
        slots, blocks = rows.slots_np[asking], rows.blocks
        at, seats, maps = upload(
            logits.device, asking, self._seat[slots], self._maps[slots]
        )
        # What was left a mask (reference_exact) may have no row of its own.
        written = (decision.commit | decision.edit)[at] & blocks.has_row[at]
        which, offsets = written.nonzero(as_tuple=True)
        requests, seats = at[which], seats[which]
        tokens = decision.new_tokens[requests, offsets]
        positions = blocks.positions[requests, offsets]
        logits_rows = rows.rows_at(requests, offsets, decision.branch)
        top = int(self._top[slots].max())
        for part, of_rows in logits.over(logits_rows):
            ids, values, ranks = top_logprobs(of_rows, top, None, tokens[part])
            where = seats[part], positions[part]
            self._ids[*where, : top + 1] = ids.int()
            self._values[*where, : top + 1] = values
            self._ranks[where] = ranks
        if self._maps[slots].any():
            # A predicted mask (reference_exact) writes nothing.
            noted = maps[which].bool() & (tokens != self.facts.mask_id)
            steps = step[requests]
            if decision.settled is not None:
                steps = decision.settled[requests, offsets]
            if decision.step_ahead is not None:
                steps = steps + decision.step_ahead[requests, offsets]
            note_writes(self._step_maps, seats[noted], positions[noted], steps[noted])

    def emit(
        self, plan: SegmentPlan, emitted: torch.Tensor, num_reqs: int
    ) -> LogprobsTensors | None:
        """Log-probabilities of the tokens that a step hands over, by vLLM's batch.

        Returns None where no request of the batch asked. Where one wants a step map,
        the token ids are followed by its `COLUMNS`, and that request's tokens by the
        rest of its block: what stands behind the end of a text has shaped it too.

        Args:
            plan: of the forward; the host's columns are still those it began with.
            emitted: [slots + 1] int64: what the requests had been handed before.
            num_reqs: of the batch.
        """
        if not self.asked(plan):
            return None
        in_batch = np.concatenate([rows.batch_rows_np for rows in plan.groups])
        order = np.argsort(in_batch)
        slots = np.concatenate([rows.slots_np for rows in plan.groups])[order]
        lengths = np.concatenate([rows.valid_np.sum(axis=1) for rows in plan.groups])
        table, asks = self.slots, self._seat[slots] >= 0
        (at,) = upload(table.device, slots)
        prompt_len = table.prompt_len[at]
        bounds = torch.stack([emitted[at] + prompt_len, table.emitted[at] + prompt_len])
        # vLLM wants the counts on the host.
        first, last = bounds.cpu().numpy()
        block_end = table.host.block_start[slots] + lengths[order]
        last = np.where(self._maps[slots], np.maximum(block_end, last), last)
        counts = np.where(asks, last - first, 0)
        owner, nth = ragged(counts)
        owner_slots = slots[owner]
        columns = int(self._top[slots[asks]].max()) + 1
        seats, positions, wanted = upload(
            table.device,
            self._seat[owner_slots],
            first[owner] + nth,
            np.arange(columns) <= self._top[owner_slots, None],
        )
        where, unwanted = (seats, positions), ~wanted.bool()
        ids = self._ids[where][:, :columns].masked_fill(unwanted, 0)
        if self._maps[slots].any():
            ids = torch.cat([ids, self._step_maps[where]], dim=1)
        values = self._values[where][:, :columns]
        # Who does not decide in this step has none.
        of_batch = np.zeros(num_reqs + 1, dtype=np.int64)
        of_batch[in_batch[order] + 1] = counts
        return LogprobsTensors(
            logprob_token_ids=ids,
            logprobs=values.masked_fill(unwanted, -torch.inf),
            selected_token_ranks=self._ranks[where],
            cu_num_generated_tokens=np.cumsum(of_batch).tolist(),
        )
