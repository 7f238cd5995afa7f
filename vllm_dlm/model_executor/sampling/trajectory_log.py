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
    from vllm_dlm.model_executor.planning.step_plan import SegmentPlan
    from vllm_dlm.model_executor.sampling.safety import SafeDecision
    from vllm_dlm.model_executor.state import DlmModelState
    from vllm_dlm.strategies.base import View


def open_log(state: DlmModelState) -> TrajectoryLog | None:
    """The log of this engine, if its server wants one; by one of parallel ranks."""
    from vllm.distributed import get_tensor_model_parallel_rank

    folder = state.server.trajectory_dir
    if folder is None or get_tensor_model_parallel_rank() != 0:
        return None
    return TrajectoryLog(state, folder)


class TrajectoryLog(Observer):
    """Writes the log of one engine.

    A line is in the file before the step's answer is out, so every step waits for the
    device: whoever asks for the log pays that.

    Args:
        state: the requests' canvases.
        folder: where the file goes; it exists.
    """

    def __init__(self, state: DlmModelState, folder: str) -> None:
        self.state = state
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = PATTERN.replace("*", f"{stamp}-{secrets.token_hex(4)}")
        path = Path(folder).expanduser() / name
        # Prompts and texts of users: for nobody else to read, whatever the umask is.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
        self._file = open(os.open(path, flags, 0o600), "w", encoding="utf-8")  # noqa: SIM115

    def add(self, slot: int) -> bool:
        """Write the line of a request that is admitted, or admitted again."""
        request = self.state.requests[slot]
        prompt_len = int(self.state.prompt_len[slot])
        prompt = self.state.tokens[slot, :prompt_len].tolist()
        line = {"request": request.id, "prompt": prompt, "mask": self.state.mask_id}
        self._append([line])
        return False

    def after_step(
        self,
        view: View,
        decision: SafeDecision,
        written: torch.Tensor,
        plan: SegmentPlan,
    ) -> None:
        """Write a line per request; the canvas holds the step's tokens already."""
        state, slots = self.state, plan.slots
        positions = plan.positions.clamp(max=state.tokens.shape[1] - 1)
        tokens = state.tokens[slots[:, None], positions]
        # A predicted mask (reference_exact) writes nothing.
        wrote = (decision.commit | decision.edit) & (tokens != state.mask_id)
        changed = wrote | decision.remask
        outputs = plan.positions - state.prompt_len[slots][:, None]
        width = plan.valid.sum(dim=1)
        end = state.canvas_end[slots] - state.prompt_len[slots]
        ends = (outputs[:, 0] + width).minimum(end)
        ahead = torch.zeros_like(tokens)
        if decision.step_ahead is not None:
            ahead = torch.where(decision.commit, decision.step_ahead, 0)
        rows = zip(
            plan.slots_np.tolist(),
            outputs[:, 0].clamp(min=0).tolist(),
            ends.tolist(),
            view.step.tolist(),
            (changed & plan.valid).cpu(),
            ahead.cpu(),
            outputs.cpu(),
            tokens.cpu(),
            strict=True,
        )
        lines = []
        for slot, first, last, number, where, later, position, token in rows:
            # Where steps share a forward (drafts), each has its line all the same.
            for nth in range(int(later.max()) + 1):
                now = where & (later == nth)
                pairs = zip(position[now].tolist(), token[now].tolist(), strict=True)
                lines.append(
                    {
                        "request": state.requests[slot].id,
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
