# SPDX-License-Identifier: Apache-2.0
"""Learn2PD without a filter: learn one from one's own finished requests.

A server that finds no filter decodes by the threshold rule and records traces. A
background thread trains a filter on them now and then. Once its false positives on
held-out traces are within the bound and it is about as fast as the threshold rule, it
is saved where the next start finds it, and requests that begin later use it. With
tensor parallelism the first worker learns, and the filter is only saved: the workers
could not change over in one step.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.logger import init_logger

from vllm_dlm.learn2pd.recorder import TraceRecorder, Traces
from vllm_dlm.model_executor.sampling.observers import Observer
from vllm_dlm.strategies.base import Context
from vllm_dlm.strategies.learn2pd import Learn2PD
from vllm_dlm.strategies.learn2pd_files import filter_path, note_learned

if TYPE_CHECKING:
    import numpy as np
    import torch

    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.planning.block_rows import BlockRows
    from vllm_dlm.model_executor.sampling.safety import SafeDecision
    from vllm_dlm.model_executor.slots import RequestSlots
    from vllm_dlm.strategies.base import View

logger = init_logger(__name__)

FIRST_ROWS = 1024
"""Trace rows before the first training; after one in vain, half as many more."""
FALSE_POSITIVE_BOUND = 0.01
"""Largest share of wrong positions that a learned filter may accept."""
SLOWER_BY = 0.01
"""How much fewer of the final tokens it may accept than the threshold rule does: that
rule's traces call right whatever it wrote, so it looks better on them than it is."""


def open_learning(slots: RequestSlots, facts: EngineFacts) -> Learning | None:
    """The learning of this engine, if its server lets it learn or record."""
    server = facts.server
    if server.online_learning or server.record_traces:
        return Learning(slots, facts)
    return None


class Learning(Observer):
    """Follows requests that can teach a filter, and teaches it."""

    def __init__(self, slots: RequestSlots, facts: EngineFacts) -> None:
        self.slots = slots
        self.facts = facts
        self.recorder = TraceRecorder(slots)
        self._wanted: dict[tuple[int, str], int] = {}
        """Block length, cache policy -> rows at which the next training begins."""
        self._learned: set[tuple[int, str]] = set()
        self._training: Training | None = None

    def add(self, slot: int) -> bool:
        """Decide whether a new request is recorded, decided positions too."""
        self._end_training()
        request = self.slots.requests[slot]
        if request.params.temperature > 0:
            return False  # what was drawn is not what the model was sure of
        if request.layout.canvas is not None:
            return False  # the request's own tokens are not the model's
        config = request.config
        if config.block_length != self.facts.default_config.block_length:
            return False  # clients may ask for many lengths; memory is for one
        learns = self._learns_from(slot)
        if learns:
            self._wanted.setdefault((config.block_length, config.cache), FIRST_ROWS)
        if learns or self.facts.server.record_traces:
            self.recorder.follow(slot)
            return True
        return False

    def _learns_from(self, slot: int) -> bool:
        """Whether a filter is to be learned from this request, by this worker."""
        config = self.slots.requests[slot].config
        strategy = self.slots.strategies[slot]
        return (
            self.facts.server.online_learning
            and isinstance(strategy, Learn2PD)
            and not strategy.has_filter
            and (config.block_length, config.cache) not in self._learned
            and get_tensor_model_parallel_rank() == 0
        )

    def remove(self, slot: int) -> None:
        """Label what the request has decided so far."""
        self.recorder.forget(slot)

    def watches(self, slots_np: np.ndarray) -> bool:
        """Whether any of these requests is recorded."""
        return self.recorder.follows(slots_np)

    def after_step(
        self,
        view: View,
        decision: SafeDecision,
        written: torch.Tensor,
        rows: BlockRows,
    ) -> None:
        """Record the step; begin a training if there are enough rows."""
        self._end_training()
        if self._training is None:
            self._train_if_enough()
        self.recorder.record(view, written, rows)

    def _train_if_enough(self) -> None:
        for (block_length, cache), wanted in self._wanted.items():
            rows = self.recorder.rows(block_length, cache)
            if rows >= wanted:
                # Of all rows so far, of which only the newest are kept.
                self._wanted[block_length, cache] = 3 * rows // 2
                self._training = Training(
                    self.recorder.traces(block_length, cache),
                    self.facts.context(cache),
                    self.facts.server.filters_path(),
                    takes_over=get_tensor_model_parallel_world_size() == 1,
                )
                self._training.start()
                return

    def _end_training(self) -> None:
        """Learn nothing more for what a finished training has learned."""
        training = self._training
        if training is None or training.is_alive():
            return
        self._training = None
        if not training.learned:
            return
        key = training.traces.block_length, training.context.cache
        del self._wanted[key]
        self._learned.add(key)


class Training(threading.Thread):
    """One training, beside the engine's own thread.

    Args:
        traces: a copy of the rows to learn from.
        context: facts of the model and the cache policy that they come from.
        folder: for learned filters.
        takes_over: whether requests to come use what is learned; else the next start.
    """

    def __init__(
        self, traces: Traces, context: Context, folder: Path, *, takes_over: bool
    ) -> None:
        super().__init__(name="vllm-dlm-learn2pd", daemon=True)
        self.traces = traces
        self.context = context
        self.folder = folder
        self.takes_over = takes_over
        self.learned = False
        """Whether a filter has been saved."""

    def run(self) -> None:
        try:
            self.learned = self._train()
        except Exception as error:  # whatever it is, requests go on as before
            logger.warning(
                "Learn2PD: learning failed, going on without: %s", error, exc_info=True
            )

    def _train(self) -> bool:
        from vllm_dlm.learn2pd.train import train_filter

        # Half the bound, so that blocks it was not calibrated on stay within it too.
        filter, report = train_filter(self.traces, bound=FALSE_POSITIVE_BOUND / 2)
        slower = report.accepted < report.accepted_by_threshold - SLOWER_BY
        if report.false_positive_rate > FALSE_POSITIVE_BOUND or slower:
            logger.info("Learn2PD: not taken over yet: %s", report)
            return False
        filter = replace(
            filter,
            model_key=self.context.model_key,
            cache=self.context.cache,
            source=f"{report.rows} steps of finished requests",
        )
        path = filter_path(self.folder, filter)
        filter.save(path)
        logger.info("Learn2PD: saved the filter %s: %s", path, report)
        if self.takes_over:
            note_learned(path)
            logger.info("Learn2PD: new requests use what was learned")
        else:
            logger.info("Learn2PD: what was learned is used from the next start on")
        return True
