# SPDX-License-Identifier: Apache-2.0
"""Asynchronous engines on a CPU, which computes at once: outcomes are withheld.

vLLM's engine core schedules and launches a step before it takes the outcome of the one
before it. Where a GPU has not come to that outcome yet, a CPU has; so whoever looks at
one too early is caught here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
from engine.harness import Engine

from vllm_dlm.model_executor import host_slots


@dataclass
class Steps:
    """What an engine has launched, and what became of it."""

    launched: int = 0
    """Forwards."""
    taken: int = 0
    """Forwards whose outcome the scheduler has taken."""
    ahead: int = 0
    """Forwards that were launched before the outcome of the one before was taken."""
    rows: list[dict[str, tuple[int, int]]] = field(default_factory=list)
    """Of each forward: request -> first row, and one past the last."""

    def of(self, request_id: str) -> list[tuple[int, int]]:
        """Rows of a request's forwards."""
        return [rows[request_id] for rows in self.rows if request_id in rows]


@contextmanager
def withholding(engine: Engine) -> Iterator[Steps]:
    """Fail whoever reads what a step has sent before its outcome was taken."""
    core = engine.llm.llm_engine.engine_core.engine_core
    assert core.batch_queue_size == 2
    assert not engine.busy
    while core.batch_queue:
        engine.step()  # what was launched behind the last request
    scheduler, steps = engine.scheduler, Steps()
    schedule, update = scheduler.schedule, scheduler.update_from_output

    def scheduled(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        rows = {}
        for name, count in output.num_scheduled_tokens.items():
            end = scheduler.requests[name].num_computed_tokens
            rows[name.rpartition("-")[0]] = end - count, end
        if rows:
            steps.ahead += steps.launched > steps.taken
            steps.launched += 1
            steps.rows.append(rows)
        return output

    def updated(output: Any, reply: Any) -> Any:
        steps.taken += bool(output.num_scheduled_tokens)
        return update(output, reply)

    class Withheld(host_slots.ToHost):
        def __init__(self, tensor: Any) -> None:
            super().__init__(tensor)
            self.step = steps.launched

        def numpy(self) -> np.ndarray:
            assert steps.taken >= self.step, "an outcome that is not there yet"
            return super().numpy()

    state = engine.runner.model_state
    preprocess = state.preprocess_state

    def preprocessed(batch: Any, *args: Any) -> None:
        # The device counts for itself where a request's rows begin.
        firsts = batch.positions[batch.query_start_loc_np[:-1]].tolist()
        assert firsts == batch.num_computed_tokens_np.tolist()
        preprocess(batch, *args)

    with (
        patch.object(state, "preprocess_state", preprocessed),
        patch.object(scheduler, "schedule", scheduled),
        patch.object(scheduler, "update_from_output", updated),
        patch.object(host_slots, "ToHost", Withheld),
    ):
        yield steps
