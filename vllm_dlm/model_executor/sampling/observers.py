# SPDX-License-Identifier: Apache-2.0
"""Observers: they look on while requests are decoded, and change nothing.

What a server does with its steps beside answering (a log, training data, a live picture
of the canvas) is an observer. The engine knows none of them by name: `OBSERVERS` maps
names to factories without importing them, and another package adds one through the
entry-point group `vllm_dlm.observers`:

    [project.entry-points."vllm_dlm.observers"]
    my_observer = "my_package.my_observer:open_observer"

Each engine calls every factory once, when its model is loaded, with the request table
(`slots.py`) and the engine's facts (`facts.py`). With tensor parallelism
each rank is an engine in this sense and decides the same: an observer that writes files
is one for the first rank alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from vllm_dlm.registry import Registry

if TYPE_CHECKING:
    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.planning.block_rows import BlockRows
    from vllm_dlm.model_executor.sampling.safety import SafeDecision
    from vllm_dlm.model_executor.slots import RequestSlots
    from vllm_dlm.strategies.base import View


class Observer:
    """What is told of every request and every step. Override what you need.

    All methods run on the engine's own thread, so each has two duties:

    - It changes nothing. All tensors and arrays are the engine's own: read them, or
      copy what is to be kept. What `after_step` is handed is not written to
      afterwards; the columns of the request table are, by every step.
    - It does not wait for the device: no `.item()`, no `.tolist()`, no `nonzero`, or
      the engine cannot prepare a step while the device computes another. Send a tensor
      with `host_slots.ToHost`, and read it when the next step is there.

    An exception ends the engine: catch what must not (a full disk).
    """

    def add(self, slot: int) -> bool:
        """A request has got a slot: a new one, or a preempted one that comes back.

        Called when the whole engine knows the request, and all that are admitted with
        it: its columns on device and host, its options and its strategy may be read. Of
        a preempted one the finished blocks are in place, and the active block is masked
        again and starts over.

        Returns:
            Whether the observer reads the statistics of positions that are decided. A
            step then puts the logits of the whole block through lm_head, as for a
            strategy whose `logit_rows` is "block".
        """
        return False

    def watches(self, slots_np: np.ndarray) -> bool:
        """Whether `after_step` has anything to do for any of these requests [R].

        A step of requests that nobody watches is one compiled function; `after_step` is
        not called for it.
        """
        return True

    def after_step(
        self,
        view: View,
        decision: SafeDecision,
        written: torch.Tensor,
        rows: BlockRows,
    ) -> None:
        """A step has been written to the canvases of R requests.

        These decode by the same strategy: a step is told once for each such group.

        The columns of tokens and masks, and where a canvas ends, are those after the
        step. Where a request goes on (its active block, its count of steps, what is
        emitted) is still what the step began with, on the device and on the host.

        Args:
            view: what the strategies saw: the blocks before the step, [R, B].
            decision: what was written, as safety has left it.
            written: [R, B] int64: tokens of the blocks now; -1 where still masked, past
                the canvas, or of a request that ends in an error with this step.
            rows: what was decided: `rows.slots_np` is the slot of each request, and
                `rows.blocks` holds positions and the like.
        """

    def remove(self, slot: int) -> None:
        """A request has finished, was aborted or is preempted: its slot becomes free.

        Called while its columns and options can still be read.
        """


Factory: TypeAlias = "Callable[[RequestSlots, EngineFacts], Observer | None]"
"""Makes the observer of one engine; None where its server's options ask for none."""

OBSERVERS: Registry[Factory] = Registry(
    "observer",
    {
        "learn2pd": "vllm_dlm.learn2pd.online:open_learning",
        "trajectory_log": "vllm_dlm.model_executor.sampling.trajectory_log:open_log",
    },
    group="vllm_dlm.observers",
)


def open_observers(slots: RequestSlots, facts: EngineFacts) -> dict[str, Observer]:
    """The observers that an engine's options ask for, by name."""
    made = {name: OBSERVERS[name](slots, facts) for name in OBSERVERS}
    return {name: observer for name, observer in made.items() if observer is not None}
