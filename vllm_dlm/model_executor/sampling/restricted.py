# SPDX-License-Identifier: Apache-2.0
"""The restrictions of running requests, by slot, and where they are in force."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_dlm.model_executor.sampling.bad_words import MASKED
from vllm_dlm.model_executor.sampling.restrictions import Restriction

if TYPE_CHECKING:
    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.planning.block_rows import BlockRows, Blocks
    from vllm_dlm.model_executor.slots import RequestSlots


def is_early(blocks: Blocks) -> torch.Tensor:
    """[R, B] bool: output positions at which `min_tokens` forbids to stop."""
    output_index = blocks.positions - blocks.requests.prompt_len[:, None]
    return output_index < blocks.requests.min_tokens[:, None]


class RestrictedRequests:
    """Applies each request's restriction to its rows, and takes back bad words."""

    def __init__(self, slots: RequestSlots, facts: EngineFacts) -> None:
        self._slots, self._facts = slots, facts
        self._restrictions: dict[int, Restriction] = {}
        self._until = np.zeros(slots.num_slots, dtype=np.int64)
        """[slots]: the position where a request's restriction ends, 0 without one."""

    def add(self, slot: int, until: int) -> None:
        """Take over what a new request restricts.

        Args:
            until: the first position behind those that `min_tokens` speaks of.
        """
        self.remove(slot)
        request, facts = self._slots.requests[slot], self._facts
        restriction = Restriction.of(request, facts)
        if restriction is not None:
            self._restrictions[slot] = restriction
            for_ever = np.iinfo(np.int64).max
            self._until[slot] = until if restriction.is_early else for_ever

    def remove(self, slot: int) -> None:
        """Forget what a request that was in this slot restricted."""
        self._restrictions.pop(slot, None)
        self._until[slot] = 0

    def now(self) -> np.ndarray:
        """[slots] bool: not every token is allowed in the active block."""
        return self._slots.host.block_start < self._until

    def apply(self, logits: torch.Tensor, which: np.ndarray, rows: BlockRows) -> None:
        """Apply requests' token restrictions in place.

        Args:
            logits: [n, V] float32.
            which: [n]: which of `rows` these are.
        """
        early, elastic = is_early(rows.blocks), self._slots.elastic
        narrow = None if elastic is None else elastic.cannot_widen(rows.blocks)
        requests = rows.row_request_np[which]
        for request in np.unique(requests[self.now()[rows.row_slots_np[which]]]):
            (mine,) = (requests == request).nonzero()
            offsets = rows.row_offset_np[which[mine]]
            restriction = self._restrictions[int(rows.slots_np[request])]
            banned = self._banned(int(request), rows)
            places = torch.from_numpy(offsets).to(logits.device, non_blocking=True)
            # A request's rows follow each other.
            part = logits[mine[0] : mine[-1] + 1]
            restriction.apply(
                part,
                early[request, places],
                offsets,
                banned,
                None if narrow is None else narrow[request],
            )

    # -- bad words ---------------------------------------------------------

    def have_bad_words(self, slots_np: np.ndarray) -> bool:
        """Whether any of these requests forbids words."""
        restricted = slots_np[self.now()[slots_np]].tolist()
        return any(self._restrictions[s].bad_words is not None for s in restricted)

    def _banned(self, row: int, plan: BlockRows) -> list[tuple[int, int]]:
        """(block offset, token) pairs that would complete a bad word."""
        words = self._restrictions[int(plan.slots_np[row])].bad_words
        if words is None:
            return []
        tokens, first = self._output(row, words.reach, plan)
        banned = words.banned(tokens, begin=max(-first, 0))
        return [(first + index, token) for index, token in banned]

    def veto_bad_words(
        self,
        commit: torch.Tensor,
        edit: torch.Tensor,
        new_tokens: torch.Tensor,
        plan: BlockRows,
    ) -> list[int]:
        """Withdraw, in place, commits and edits that would write a bad word.

        Returns:
            The rows, 0 to R - 1, that lost commits.
        """
        rows = []
        for row in self.now()[plan.slots_np].nonzero()[0].tolist():
            words = self._restrictions[int(plan.slots_np[row])].bad_words
            if words is None:
                continue
            tokens, first = self._output(row, words.reach, plan)
            (offsets,) = (commit[row] | edit[row]).nonzero(as_tuple=True)
            indices = (offsets - first).tolist()
            written = new_tokens[row, offsets].tolist()
            vetoed = words.vetoed(tokens, dict(zip(indices, written, strict=True)))
            places = torch.tensor(vetoed, dtype=torch.int64) + first
            if commit[row, places].any():
                rows.append(row)
            commit[row, places] = edit[row, places] = False
        return rows

    def _output(self, row: int, reach: int, plan: BlockRows) -> tuple[list[int], int]:
        """A block's output tokens and up to `reach` left of it, `MASKED` where open.

        And the block offset of the first of them.
        """
        table, slot = self._slots, int(plan.slots_np[row])
        block_start = int(table.host.block_start[slot])
        begin = max(block_start - reach, int(table.host.prompt_len[slot]))
        end = block_start + int(plan.valid_np[row].sum())
        tokens = table.tokens[slot, begin:end]
        hidden = table.masked[slot, begin:end]
        return tokens.masked_fill(hidden, MASKED).tolist(), begin - block_start
