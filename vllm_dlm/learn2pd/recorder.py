# SPDX-License-Identifier: Apache-2.0
"""TraceRecorder: what the model was sure of in each step, and whether it was right.

A trace row is one denoise step of one block: the confidences of its B positions and,
for each position still masked then, whether its best token was the one finally written.
That is all Learn2PD's filter is trained on (arXiv 2509.25188); no token, let alone any
text, is kept. Memory is bounded: the newest rows replace the oldest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from vllm_dlm.model_executor.host_slots import ToHost

if TYPE_CHECKING:
    from vllm_dlm.model_executor.planning.block_rows import BlockRows
    from vllm_dlm.model_executor.slots import RequestSlots
    from vllm_dlm.strategies.base import View

CAPACITY = 1 << 16
"""Trace rows kept per block length and KV policy; 32-position blocks take 10 MB."""

WRONG, RIGHT, IGNORED = 0, 1, 2
"""Labels: the best token was not the final one; it was; decided before, or unknown."""


@dataclass(frozen=True)
class Traces:
    """N trace rows of one block length B."""

    confidence: np.ndarray
    """[N, B] float32; positions past the canvas count as 1."""
    label: np.ndarray
    """[N, B] int8: `WRONG`, `RIGHT` or `IGNORED`."""
    block: np.ndarray
    """[N] int64: rows of one decoded block share a number (to split by)."""

    def __len__(self) -> int:
        return len(self.block)

    @property
    def block_length(self) -> int:
        """B."""
        return int(self.confidence.shape[1])


class _Ring:
    """The newest `CAPACITY` rows of one block length."""

    def __init__(self, block_length: int) -> None:
        self.confidence = np.ones((CAPACITY, block_length), dtype=np.float32)
        self.label = np.full((CAPACITY, block_length), IGNORED, dtype=np.int8)
        self.block = np.zeros(CAPACITY, dtype=np.int64)
        self.rows = 0

    def append(self, confidence: np.ndarray, label: np.ndarray, block: int) -> None:
        where = np.arange(self.rows, self.rows + len(label)) % CAPACITY
        self.confidence[where] = confidence
        self.label[where] = label
        self.block[where] = block
        self.rows += len(label)

    def copy(self) -> Traces:
        count = min(self.rows, CAPACITY)
        return Traces(
            self.confidence[:count].copy(),
            self.label[:count].copy(),
            self.block[:count].copy(),
        )


class _Arriving(NamedTuple):
    """A request's step on its way to the host."""

    sent: ToHost
    """[R, 3, B] int32, of the request's group."""
    row: int
    block_start: int
    """Of the block that was decided."""


class TraceRecorder:
    """Collects trace rows of the requests it is told to follow.

    A step of the whole batch goes to the host in one piece, behind the step's own work,
    and is taken apart when the next one has been planned: nothing waits for it. What is
    kept are the rows of followed requests, until their block ends.
    """

    def __init__(self, slots: RequestSlots) -> None:
        self.slots = slots
        self._rings: dict[tuple[int, str], _Ring] = {}
        self._steps: dict[int, list[np.ndarray]] = {}
        """slot -> [3, B] int32 for each step of its block, as `record` packs them."""
        self._arriving: dict[int, _Arriving] = {}
        """By slot: each request's last step."""
        self._blocks = 0

    def follow(self, slot: int) -> None:
        """Record a new request from now on; all its block's logits must be read."""
        self._steps[slot] = []

    def forget(self, slot: int) -> None:
        """End of a request: label what its unfinished block has decided so far."""
        self._receive()
        if slot in self._steps:
            self._close(slot)
            del self._steps[slot]

    def clear(self) -> None:
        """Forget all rows, and the requests that are followed."""
        self._receive()
        self._rings.clear()
        self._steps.clear()

    def follows(self, slots_np: np.ndarray) -> bool:
        """Whether any of these requests is recorded."""
        return any(slot in self._steps for slot in slots_np.tolist())

    def record(self, view: View, written: torch.Tensor, rows: BlockRows) -> None:
        """Note one step: how sure the model was of which tokens, and what was written.

        The arguments are those of `Observer.after_step`.
        """
        if self._arriving.keys() & set(rows.slots_np.tolist()):
            # Of an earlier step: this one has been planned since.
            self._receive()
        if not self.follows(rows.slots_np):
            return
        confidence = torch.where(view.valid, view.confidence, 1.0)
        step = [
            confidence.float().view(torch.int32),
            torch.where(view.masked, view.candidate, -1).int(),
            written.int(),
        ]
        sent = ToHost(torch.stack(step, dim=1))
        # Of this step still: where the requests go on is not known yet.
        block_start = self.slots.host.block_start[rows.slots_np]
        for row, slot in enumerate(rows.slots_np.tolist()):
            if slot in self._steps:
                self._arriving[slot] = _Arriving(sent, row, int(block_start[row]))

    def _receive(self) -> None:
        """Take the last step apart, once it is known which blocks it ended.

        Within a step nothing is waited for: planning has settled the host's columns.
        """
        arriving, self._arriving = self._arriving, {}
        if not arriving:
            return
        host = self.slots.host
        host.settle(np.array([*arriving]))
        sent = {step.sent for step in arriving.values()}
        arrays = {one: one.numpy() for one in sent}
        for slot, step in arriving.items():
            self._steps[slot].append(arrays[step.sent][step.row].copy())
            if host.block_start[slot] != step.block_start:
                self._close(slot)

    def _close(self, slot: int) -> None:
        """Label the steps of a block by what is written there now."""
        steps, self._steps[slot] = self._steps[slot], []
        if not steps:
            return
        packed = np.stack(steps)
        candidate, final = packed[:, 1], packed[-1, 2]
        label = np.where(candidate == final, RIGHT, WRONG)
        label[(candidate < 0) | (final < 0)] = IGNORED
        width, policy = len(final), self.slots.requests[slot].config.cache
        if (width, policy) not in self._rings:
            self._rings[width, policy] = _Ring(width)
        self._blocks += 1
        confidence = packed[:, 0].view(np.float32)
        self._rings[width, policy].append(confidence, label, self._blocks)

    def rows(self, block_length: int, cache: str) -> int:
        """Rows recorded so far for blocks of this length under this KV policy."""
        self._receive()
        ring = self._rings.get((block_length, cache))
        return 0 if ring is None else ring.rows

    def traces(self, block_length: int, cache: str) -> Traces:
        """A copy of the rows kept for one block length and KV policy."""
        self._receive()
        ring = self._rings.get((block_length, cache))
        return _Ring(block_length).copy() if ring is None else ring.copy()
