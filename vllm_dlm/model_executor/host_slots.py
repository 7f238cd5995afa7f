# SPDX-License-Identifier: Apache-2.0
"""HostSlots: what planning must know of each request, in host memory.

Most columns are fixed when a request is admitted. Where its active block stands, and
which of its positions are masked, is decided on the device: each step's advance sends
that (`send`), behind the work whose outcome the scheduler waits for in any case, so
that reading the columns here waits for nothing more.

Of requests that run ahead (`running_ahead.py`), a forward is planned before the outcome
of the one before it is there. Nothing is sent for them, and what their steps change is
unknown here: `planning/guesses.py` looks it up on the device.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from vllm_dlm.config.cache import FAR

if TYPE_CHECKING:
    from vllm_dlm.model_executor.layout import RequestLayout

OPEN_MASKS, MASKS, BLOCK = 0, 1, 2
"""Of the active block: masks of the first sub-block that has any; all its masks; all
its positions."""


class HostSlots:
    """Columns by slot, as arrays.

    Args:
        num_slots: requests that there can be at a time.
        length: positions that a request can have.
    """

    def __init__(self, num_slots: int, length: int) -> None:
        def per_slot(dtype: type = np.int64) -> np.ndarray:
            return np.zeros(num_slots, dtype=dtype)

        self.prompt_len = per_slot()
        self.block_length = per_slot()
        self.attended_length = per_slot()
        """Positions of a block as attention has it."""
        self.window = per_slot()
        """Positions that are decided together, from the active block's first one on."""
        self.sub_block_length = per_slot()
        self.origin = per_slot()
        """Position from which blocks are counted."""
        self.first_block = per_slot()
        """Start of the block that was active when the request was (re-)admitted."""
        self.leads = per_slot(bool)
        """Whether the first forward decides that block's lead, its first token, alone:
        from the rows to its left."""
        self.text_end = per_slot()
        """End of the block in which the longest text ends."""
        self.reads = per_slot()
        """Which positions of the active block have their logits read: `OPEN_MASKS`,
        `MASKS` or `BLOCK`."""
        self.group = per_slot()
        """Number of the strategy group (`sampling/groups.py`) that decides it."""
        self.predicts_end = per_slot(bool)
        """Whether the option `eotp` is on."""
        self.looks_out = per_slot(bool)
        """Whether it is `canvas`: rows right of the active block are read for it."""
        self.grows = per_slot(bool)
        """Whether the canvas may grow: so are they in a block's first step."""
        self.exact = per_slot(bool)
        """Whether the option `reference_exact` is on."""
        self.computed_end = per_slot()
        """With full attention: one past the last position of the canvas that was
        computed. All up to there is seen."""
        self.writable = per_slot()
        """Masks, from the left, that a step may write."""
        self.prunes = per_slot(bool)
        """Whether a refresh may end before the canvas."""
        self.verifies = per_slot(bool)
        """Whether drafts are verified by every second forward (`Strategy.verifies`)."""
        self.opens_alone = per_slot(bool)
        """Whether a block's first step writes its first token alone (`opening.py`)."""
        self.is_watched = per_slot(bool)
        """Whether each step sends a frame (`frames.py`)."""
        self.block_start = per_slot()
        """Position of the active block's first token."""
        self.step = per_slot()
        """Denoise steps that the active block has had."""
        self.canvas_end = per_slot()
        """One past the canvas's last position. Not above `block_start` where the next
        forward opens a canvas, whose rows say how wide it is."""
        self.masked = np.zeros((num_slots, length), dtype=bool)
        """Masks of the active block and of what is decided with it, by place."""
        self.runs_ahead = per_slot(bool)
        """Whether the columns that steps change are known on the device alone."""
        self.has_canvas = per_slot(bool)
        """Whether the request has brought a canvas (`pins.py`)."""
        self.is_elastic = per_slot(bool)
        """Whether the canvas's hole widens and narrows (`elastic.py`)."""
        self.reply_width = per_slot()
        """Tokens that one step may hand out at most."""
        self._arriving: deque[_Sent] = deque()
        """Steps whose outcome is on its way, in order."""

    def admit(
        self,
        slot: int,
        layout: RequestLayout,
        masked: np.ndarray,
        *,
        predicts_end: bool,
        looks_out: bool,
        exact: bool,
        runs_ahead: bool,
        is_watched: bool,
    ) -> None:
        """Take over the layout of a new request.

        Args:
            masked: bool: which positions are masked, from the first block's start on.
            predicts_end: whether its option `eotp` is on.
            looks_out: whether it is `canvas`.
            exact: whether its option `reference_exact` is.
            runs_ahead: whether its forwards are planned before the last outcome is
                there.
            is_watched: whether each of its steps sends a frame.
        """
        # What is on its way for this slot is of the request before.
        self._arriving = deque(sent.without(slot) for sent in self._arriving)
        self.runs_ahead[slot] = runs_ahead
        self.is_watched[slot] = is_watched
        self.prompt_len[slot] = layout.prompt_len
        self.block_length[slot] = layout.block_length
        self.attended_length[slot] = layout.attended_length
        self.sub_block_length[slot] = layout.sub_block_length
        self.origin[slot] = layout.origin
        self.first_block[slot] = self.block_start[slot] = layout.first_block
        self.leads[slot] = layout.leads_first
        self.text_end[slot] = layout.text_end
        self.canvas_end[slot] = 0 if layout.is_full else layout.text_end
        self.computed_end[slot] = 0
        self.writable[slot] = layout.reach.right if layout.reach.follows else FAR
        self.prunes[slot] = layout.reach.refresh_right < FAR
        self.opens_alone[slot] = layout.opens_alone
        self.verifies[slot] = layout.verifies
        self.step[slot] = layout.first_step
        self.predicts_end[slot] = predicts_end
        self.looks_out[slot] = looks_out
        self.grows[slot] = layout.growth.expansion > 0
        self.exact[slot] = exact
        self.window[slot] = width = min(layout.window, self.masked.shape[1])
        self.masked[slot, :width] = True
        self.masked[slot, : len(masked[:width])] = masked[:width]
        canvas = layout.canvas
        self.has_canvas[slot] = canvas is not None
        self.is_elastic[slot] = layout.is_elastic
        written = 0 if canvas is None else canvas.handed_along
        self.reply_width[slot] = width + written

    def looking_out(self, slots: np.ndarray) -> np.ndarray:
        """[n] bool: requests of whose next forward rows right of the block are read.

        Args:
            slots: [n], of one group.
        """
        looking: np.ndarray = self.looks_out[slots] | self.growing(slots)
        return looking

    def growing(self, slots: np.ndarray) -> np.ndarray:
        """[n] bool: requests whose canvas the next forward may let grow.

        Nothing of the active block is written yet.

        Args:
            slots: [n], of one group.
        """
        untouched = self.masked[slots, : self.block_length[slots[0]]].all(axis=1)
        growing: np.ndarray = self.grows[slots] & untouched
        return growing

    def note_computed(self, slots: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Note what the next forward of some requests computes, with full attention.

        Args:
            slots: [R].
            ends: [R]: one past the last position computed for each.

        Returns:
            [R]: `computed_end` from then on. With a canvas, it begins anew.
        """
        begins = self.canvas_end[slots] <= self.block_start[slots]
        before = np.where(begins, 0, self.computed_end[slots])
        self.computed_end[slots] = noted = np.maximum(before, ends)
        return noted

    def read_whole_block(self, slot: int) -> None:
        """From now on have the logits of decided positions read too."""
        self.reads[slot] = BLOCK

    def send(
        self,
        slots: np.ndarray,
        rows: np.ndarray,
        where: torch.Tensor,
        masked: torch.Tensor,
    ) -> None:
        """Send where a step has left some requests; `settle` stores what arrives.

        Args:
            slots, rows: [n]: each request's, in the table and in what follows.
            where: [3, at least n] int32: block start, canvas end, step.
            masked: [at least n, B] bool: of the blocks that are active now.
        """
        self._arriving.append(_Sent(slots, rows, ToHost(where), ToHost(masked)))

    def settle(self, slots: np.ndarray) -> None:
        """Wait for what was sent of these requests, and store it.

        Call this before touching a column that steps change. The scheduler has taken
        the outcome of these requests' last step before it schedules them again; a later
        step of others, which may still be computed, is not waited for.

        Args:
            slots: none of them of a request that runs ahead.
        """
        count = 0
        for number, sent in enumerate(self._arriving, start=1):
            if np.isin(slots, sent.slots).any():
                count = number
        for _ in range(count):
            sent = self._arriving.popleft()
            masked = sent.masked.numpy()[sent.rows]
            start, end, step = sent.where.numpy()[:, sent.rows]
            self.block_start[sent.slots], self.canvas_end[sent.slots] = start, end
            self.step[sent.slots] = step
            self.masked[sent.slots, : masked.shape[1]] = masked


class _Sent(NamedTuple):
    """Where a step has left some requests; see `HostSlots.send`."""

    slots: np.ndarray
    rows: np.ndarray
    where: ToHost
    masked: ToHost

    def without(self, slot: int) -> _Sent:
        """The same, but for one request."""
        others = self.slots != slot
        return self._replace(slots=self.slots[others], rows=self.rows[others])


class ToHost:
    """A tensor on its way to host memory; nothing may write to it meanwhile."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._sent: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._tensor = host.copy_(tensor, non_blocking=True)
            self._sent = torch.cuda.Event()
            self._sent.record()

    def numpy(self) -> np.ndarray:
        """The tensor, once it is there."""
        if self._sent is not None:
            self._sent.synchronize()
        array: np.ndarray = self._tensor.numpy()
        return array
