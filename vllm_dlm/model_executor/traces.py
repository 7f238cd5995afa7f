# SPDX-License-Identifier: Apache-2.0
"""TraceRecorder: what the model was sure of in each step, and whether it was right.

A trace row is one denoise step of one block: the confidences of its B positions and,
for each position still masked then, whether its best token was the one finally written.
That is all Learn2PD's filter is trained on (arXiv 2509.25188); no token, let alone any
text, is kept. Memory is bounded: the newest rows replace the oldest.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_dlm.model_executor.host_slots import BLOCK

if TYPE_CHECKING:
    from vllm_dlm.model_executor.segments import SegmentPlan
    from vllm_dlm.model_executor.state import DlmModelState
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


class TraceRecorder:
    """Collects trace rows of the requests it is told to follow."""

    def __init__(self, state: DlmModelState) -> None:
        self.state = state
        self._rings: dict[tuple[int, str], _Ring] = {}
        self._steps: dict[int, list[tuple[torch.Tensor, ...]]] = {}
        self._blocks = 0
        # The engine's thread writes, a learner's thread copies.
        self._lock = threading.Lock()

    def follow(self, slot: int) -> None:
        """Record a new request from now on, decided positions too."""
        self._steps[slot] = []
        self.state.host.reads[slot] = BLOCK

    def forget(self, slot: int) -> None:
        """End of a request: label what its unfinished block has decided so far."""
        if slot in self._steps:
            self._close(slot, int(self.state.block_start[slot]))
            del self._steps[slot]

    def observe(self, view: View, plan: SegmentPlan) -> None:
        """Note one step's confidences, best tokens and masks, before the decision."""
        if not self._steps:
            return
        for row, slot in enumerate(plan.slots_np.tolist()):
            if slot in self._steps:
                width = self.state.requests[slot].config.block_length
                self._steps[slot].append(
                    (
                        torch.where(view.valid, view.confidence, 1.0)[row, :width],
                        view.candidate[row, :width].clone(),
                        view.masked[row, :width].clone(),
                    )
                )

    def finish(self, done: torch.Tensor, plan: SegmentPlan) -> None:
        """Label the steps of blocks that are complete now."""
        if not self._steps:
            return
        for row in done.nonzero()[:, 0].tolist():
            slot = int(plan.slots_np[row])
            if slot in self._steps:
                self._close(slot, int(plan.positions[row, 0]))
                self._steps[slot] = []

    def _close(self, slot: int, begin: int) -> None:
        steps = self._steps[slot]
        if not steps:
            return
        confidence, token, masked = (
            torch.stack(part) for part in zip(*steps, strict=True)
        )
        width = confidence.shape[1]
        span = slice(begin, min(begin + width, int(self.state.canvas_end[slot])))
        final = torch.full((width,), -1, dtype=torch.int64, device=token.device)
        known = torch.zeros(width, dtype=torch.bool, device=token.device)
        count = span.stop - span.start
        if count <= 0:
            return
        final[:count] = self.state.tokens[slot, span].long()
        known[:count] = ~self.state.masked[slot, span]
        label = torch.where(token == final, RIGHT, WRONG)
        label = torch.where(masked & known, label, IGNORED)
        policy = self.state.requests[slot].config.cache
        with self._lock:
            ring = self._rings.setdefault((width, policy), _Ring(width))
            self._blocks += 1
            ring.append(
                confidence.float().cpu().numpy(),
                label.to(torch.int8).cpu().numpy(),
                self._blocks,
            )

    def rows(self, block_length: int, cache: str) -> int:
        """Rows recorded so far for blocks of this length under this KV policy."""
        ring = self._rings.get((block_length, cache))
        return 0 if ring is None else ring.rows

    def traces(self, block_length: int, cache: str) -> Traces:
        """A copy of the rows kept for one block length and KV policy."""
        with self._lock:
            ring = self._rings.get((block_length, cache))
            return _Ring(block_length).copy() if ring is None else ring.copy()
