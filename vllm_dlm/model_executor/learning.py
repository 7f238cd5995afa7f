# SPDX-License-Identifier: Apache-2.0
"""Learn2PD without a filter: learn one from one's own finished requests.

A server that finds no filter decodes by the threshold rule and records traces. A
background thread trains a filter on them now and then. Once its false positives on
held-out traces are within the bound and it is about as fast as the threshold rule, it
is saved where the next start finds it, and requests that begin later use it. With
tensor parallelism the ranks could not change over in one step: it is only saved then.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger

from vllm_dlm.model_executor.traces import TraceRecorder, Traces

if TYPE_CHECKING:
    from vllm_dlm.model_executor.groups import StrategyGroups
    from vllm_dlm.model_executor.segments import SegmentPlan
    from vllm_dlm.model_executor.state import DlmModelState
    from vllm_dlm.strategies.base import View

logger = init_logger(__name__)

FIRST_ROWS = 1024
"""Trace rows before the first training; after a failed one, half as many more."""
FALSE_POSITIVE_BOUND = 0.01
"""Largest share of wrong positions that a learned filter may accept."""
SLOWER_BY = 0.01
"""How much fewer of the final tokens it may accept than the threshold rule does: that
rule's traces call right whatever it wrote, so it looks better on them than it is."""


class Learning:
    """Follows requests that can teach a filter, and teaches it."""

    def __init__(self, state: DlmModelState, groups: StrategyGroups) -> None:
        self.state = state
        self.groups = groups
        self.recorder = TraceRecorder(state)
        self._wanted: dict[tuple[int, str], int] = {}
        self._thread: threading.Thread | None = None

    def add(self, slot: int) -> None:
        """Decide whether a new request is recorded."""
        from vllm_dlm.strategies.learn2pd import Learn2PD

        request = self.state.requests[slot]
        if request.params.temperature > 0:
            return  # what was drawn is not what the model was sure of
        if request.config.block_length != self.state.default_config.block_length:
            return  # clients may ask for many lengths; memory is for the served one
        strategy = self.groups.strategy_of(slot)
        learns = (
            self.state.server.online_learning
            and isinstance(strategy, Learn2PD)
            and not strategy.has_filter
        )
        if learns or self.state.server.record_traces:
            self.recorder.follow(slot)
        if learns:
            config = request.config
            self._wanted.setdefault((config.block_length, config.cache), FIRST_ROWS)

    def remove(self, slot: int) -> None:
        """A request has left."""
        self.recorder.forget(slot)

    def observe(self, view: View, plan: SegmentPlan) -> None:
        """Before the decision of a step."""
        self.recorder.observe(view, plan)

    def finish(self, done: torch.Tensor, plan: SegmentPlan) -> None:
        """After a step: complete blocks become traces; train if there are enough."""
        self.recorder.finish(done, plan)
        if self._thread is not None and self._thread.is_alive():
            return
        for (block_length, cache), wanted in self._wanted.items():
            if self.recorder.rows(block_length, cache) >= wanted:
                self._thread = threading.Thread(
                    target=self._learn,
                    args=(block_length, cache),
                    name="vllm-dlm-learn2pd",
                    daemon=True,
                )
                self._thread.start()
                return

    def _learn(self, block_length: int, cache: str) -> None:
        key = (block_length, cache)
        traces = self.recorder.traces(block_length, cache)
        try:
            learned = self._train(traces, block_length, cache)
        except (OSError, ValueError) as error:
            logger.warning("Learn2PD: learning failed, going on without: %s", error)
            learned = False
        if learned:
            self._wanted.pop(key, None)
        else:
            self._wanted[key] = 3 * len(traces) // 2

    def _train(self, traces: Traces, block_length: int, cache: str) -> bool:
        from vllm.distributed import (
            get_tensor_model_parallel_rank,
            get_tensor_model_parallel_world_size,
        )

        from vllm_dlm.training.filter import filter_path, train_filter

        # Half the bound, so that blocks it was not calibrated on stay within it too.
        filter, report = train_filter(traces, bound=FALSE_POSITIVE_BOUND / 2)
        slower = report.accepted < report.accepted_by_threshold - SLOWER_BY
        if report.false_positive_rate > FALSE_POSITIVE_BOUND or slower:
            logger.info("Learn2PD: not taken over yet: %s", report)
            return False
        context = self.state.context(cache)
        filter = replace(
            filter,
            model_key=context.model_key,
            cache=cache,
            source=f"{report.rows} steps of finished requests",
        )
        path = filter_path(self.state.server.filters_path(), filter)
        if get_tensor_model_parallel_rank() == 0:
            filter.save(path)
        if get_tensor_model_parallel_world_size() > 1:
            logger.info("Learn2PD: saved %s for the next start: %s", path, report)
            return True
        self.groups.renew("learn2pd")
        logger.info("Learn2PD: took over the filter saved at %s: %s", path, report)
        return True
