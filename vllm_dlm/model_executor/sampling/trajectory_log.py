# SPDX-License-Identifier: Apache-2.0
"""Writes the trajectory log, whose lines `vllm_dlm/trajectories.py` explains."""

from __future__ import annotations

import json
import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_dlm.model_executor.sampling.observers import Observer
from vllm_dlm.trajectories import PATTERN

if TYPE_CHECKING:
    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.planning.block_rows import BlockRows
    from vllm_dlm.model_executor.sampling.safety import SafeDecision
    from vllm_dlm.model_executor.slots import RequestSlots
    from vllm_dlm.strategies.base import View


def open_log(slots: RequestSlots, facts: EngineFacts) -> TrajectoryLog | None:
    """The log of this engine, if its server wants one; by one of parallel ranks."""
    from vllm.distributed import get_tensor_model_parallel_rank

    folder = facts.server.trajectory_dir
    if folder is None or get_tensor_model_parallel_rank() != 0:
        return None
    return TrajectoryLog(slots, facts.mask_id, folder)


class TrajectoryLog(Observer):
    """Writes the log of one engine.

    A line is in the file before the step's answer is out, so every step waits for the
    device: whoever asks for the log pays that.

    Args:
        slots: the requests' canvases.
        mask_id: the token id that stands for a mask.
        folder: where the file goes; it exists.
    """

    def __init__(self, slots: RequestSlots, mask_id: int, folder: str) -> None:
        self.slots = slots
        self.mask_id = mask_id
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = PATTERN.replace("*", f"{stamp}-{secrets.token_hex(4)}")
        path = Path(folder).expanduser() / name
        # Prompts and texts of users: for nobody else to read, whatever the umask is.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
        self._file = open(os.open(path, flags, 0o600), "w", encoding="utf-8")  # noqa: SIM115

    def add(self, slot: int) -> bool:
        """Write the line of a request that is admitted, or admitted again."""
        request = self.slots.requests[slot]
        prompt = self.slots.tokens[slot, : request.layout.prompt_len].tolist()
        line = {"request": request.id, "prompt": prompt, "mask": self.mask_id}
        if (canvas := request.layout.canvas) is not None:
            (written,) = (~canvas.is_hole).nonzero()
            line["pins"] = [[at, canvas.tokens[at]] for at in written.tolist()]
        self._append([line])
        return False

    def after_step(
        self,
        view: View,
        decision: SafeDecision,
        written: torch.Tensor,
        rows: BlockRows,
    ) -> None:
        """Write a line per request; the canvas holds the step's tokens already."""
        table, blocks = self.slots, rows.blocks
        slots = blocks.slots
        tokens = table.tokens[slots[:, None], blocks.places]
        # A predicted mask (reference_exact) writes nothing.
        wrote = (decision.commit | decision.edit) & (tokens != self.mask_id)
        changed = wrote | decision.remask
        outputs = blocks.positions - table.prompt_len[slots][:, None]
        width = blocks.valid.sum(dim=1)
        end = table.canvas_end[slots] - table.prompt_len[slots]
        ends = (outputs[:, 0] + width).minimum(end)
        ahead = torch.zeros_like(tokens)
        if decision.step_ahead is not None:
            ahead = torch.where(decision.commit, decision.step_ahead, 0)
        steps = zip(
            rows.slots_np.tolist(),
            outputs[:, 0].clamp(min=0).tolist(),
            ends.tolist(),
            view.step.tolist(),
            (changed & blocks.valid).cpu(),
            ahead.cpu(),
            outputs.cpu(),
            tokens.cpu(),
            strict=True,
        )
        lines = []
        for slot, first, last, number, where, later, position, token in steps:
            # Where steps share a forward (drafts), each has its line all the same.
            for nth in range(int(later.max()) + 1):
                now = where & (later == nth)
                pairs = zip(position[now].tolist(), token[now].tolist(), strict=True)
                lines.append(
                    {
                        "request": table.requests[slot].id,
                        "block": [first, last],
                        "step": number + nth,
                        "writes": [list(pair) for pair in pairs if pair[0] < last],
                    }
                )
        self._append(lines)

    def _append(self, lines: list[dict[str, Any]]) -> None:
        try:
            self._file.write("".join(json.dumps(line) + "\n" for line in lines))
            self._file.flush()
        except OSError as error:
            from vllm.logger import init_logger

            # A full disk is no reason to stop serving.
            init_logger(__name__).error("The trajectory log ends here: %s", error)
            self._file = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
