# SPDX-License-Identifier: Apache-2.0
"""Frames inside the engine: what the canvas of a watched request looks like by now.

After each step of a request that somebody watches, the worker reads the active block
off the request table: tokens, masks, and how probable the tokens were. That rides to
the host with the step's reply, so that nothing waits for it, and one of parallel ranks
replies. The scheduler makes a `Frame` of it (`scheduling/frames.py`).

What a step looks like follows from the table alone, so a compiled step is watched as
well as any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from vllm_dlm.config.frames import MASK, NOT_READ

if TYPE_CHECKING:
    from vllm_dlm.model_executor.planning.block_rows import Blocks
    from vllm_dlm.model_executor.sampling.choice import Choice
    from vllm_dlm.model_executor.slots import RequestSlots

START, END, STEP = range(3)
"""Columns of a request's row: where the active block begins, where the canvas ends, and
the block's steps before this one. Behind them are the block's tokens, and then, as bits
of float32, its confidences."""
COLUMNS = 3

NOWHERE = -2
"""In a token's place, beside `MASK`: no position of the canvas."""


class FrameTensors(NamedTuple):
    """A step's frames on the engine's device.

    It has the methods of vLLM's `SamplingMaskTensors`, in whose place it travels.
    """

    rows: torch.Tensor
    """[requests + 1, COLUMNS + 2 W] int32, by vLLM's batch; `START` is below 0
    where there is no frame. The last row stands for no request, as in `Reply`."""

    @classmethod
    def empty(cls, num_reqs: int, width: int, device: torch.device) -> FrameTensors:
        """No frame yet.

        Args:
            width: W: positions of the longest block that is decided.
        """
        shape = num_reqs + 1, COLUMNS + 2 * width
        return cls(torch.full(shape, NOWHERE, dtype=torch.int32, device=device))

    def note(
        self,
        blocks: Blocks,
        table: RequestSlots,
        choice: Choice,
        canvas_ends: torch.Tensor,
    ) -> None:
        """Read the frames of a group off the table, after its step.

        Args:
            blocks: [R, B] as the step found them.
            choice: of the step's rows.
            canvas_ends: [requests + 1], by vLLM's batch: where they end now.
        """
        place = blocks.slots[:, None], blocks.places
        end = canvas_ends[blocks.batch_rows]
        exists = blocks.valid & (blocks.positions < end[:, None])
        tokens = torch.where(table.masked[place], MASK, table.tokens[place])
        confidence = torch.where(
            blocks.has_row, choice.confidence[blocks.row_at.clamp(min=0)], NOT_READ
        )
        head = torch.stack([blocks.positions[:, 0], end, blocks.requests.step], dim=1)
        width, most = blocks.width, (self.rows.shape[1] - COLUMNS) // 2
        of_group = self.rows.new_full((len(head), self.rows.shape[1]), NOWHERE)
        of_group[:, :COLUMNS] = head
        of_group[:, COLUMNS : COLUMNS + width] = torch.where(exists, tokens, NOWHERE)
        bits = confidence.float().contiguous().view(torch.int32)
        of_group[:, COLUMNS + most : COLUMNS + most + width] = bits
        self.rows[blocks.batch_rows] = of_group

    def to_cpu_nonblocking(self) -> FrameTensors:
        """The same on its way to the host; vLLM waits for it with the tokens."""
        return FrameTensors(self.rows.to("cpu", non_blocking=True))

    def tolists(self, num_sampled: object = None) -> np.ndarray:
        """[requests, COLUMNS + 2 W] int32, for the scheduler."""
        rows: np.ndarray = self.rows[:-1].numpy()
        return rows
