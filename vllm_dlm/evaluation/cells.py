# SPDX-License-Identifier: Apache-2.0
"""What a run of `vllm-dlm eval` measures: a task with a strategy and a cache policy."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_dlm.bench.cells import Cell
from vllm_dlm.strategies import STRATEGIES

OURS, AUTOREGRESSIVE = "vllm-dlm", "ar"


@dataclass(frozen=True)
class TaskCell(Cell):
    """A cell of the benchmark's, for a task."""

    task: str = ""
    tokens_per_step: int | None = None
    """Of strategies that follow a schedule; None for others."""

    @property
    def setting(self) -> str:
        """As `Cell.setting`, with the schedule among the strategy's parameters."""
        if self.tokens_per_step is None:
            return super().setting
        shown = {**self.strategy_config, "tokens_per_step": self.tokens_per_step}
        return Cell(
            self.engine,
            self.dtype,
            self.concurrency,
            self.strategy,
            shown,
            self.cache,
            self.cache_config,
        ).setting

    def described(self) -> dict[str, Any]:
        """What identifies the cell, as its result names it."""
        own = {"task": self.task, "tokens_per_step": self.tokens_per_step}
        return super().described() | own


def all_cells(args: argparse.Namespace, tasks: Sequence[str]) -> Iterator[TaskCell]:
    """Every combination, those of our model first.

    Raises:
        ValueError: `--tokens-per-step` is for none of the strategies.
    """
    scheduled = [
        STRATEGIES[name].follows_schedule(STRATEGIES[name].Params(**config))
        for name, config in args.strategies
    ]
    if args.tokens_per_step is not None and not any(scheduled):
        raise ValueError(
            "--tokens-per-step is for strategies that follow a schedule, such as "
            "static: name one in --strategies, or leave it out"
        )
    for task in tasks:
        for (strategy, config), follows in zip(args.strategies, scheduled, strict=True):
            for cache, cache_config in args.caches:
                for count in (args.tokens_per_step or [1]) if follows else [None]:
                    yield TaskCell(
                        OURS,
                        args.dtype,
                        args.concurrency,
                        strategy,
                        config,
                        cache,
                        cache_config,
                        task,
                        count,
                    )
    if args.ar is not None:
        for task in tasks:
            yield TaskCell(AUTOREGRESSIVE, args.dtype, args.concurrency, task=task)
