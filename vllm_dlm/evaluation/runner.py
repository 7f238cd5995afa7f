# SPDX-License-Identifier: Apache-2.0
"""The run over all cells: each engine is started once, and asks one task at a time."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import mean
from typing import TYPE_CHECKING, Any

from vllm_dlm.bench.cells import Results, digest
from vllm_dlm.evaluation.cells import AUTOREGRESSIVE, OURS, TaskCell, all_cells
from vllm_dlm.evaluation.engines import Answers, answered, numbers_of, started
from vllm_dlm.evaluation.tasks import Task

if TYPE_CHECKING:
    from vllm import LLM

    from vllm_dlm.evaluation.lm_eval_tasks import HarnessTask


class Runner:
    """A run of `vllm-dlm eval`.

    Args:
        args: of the command line, checked.
        tasks: that are asked, by name.
        results: where cells are kept.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        tasks: Sequence[Task | HarnessTask],
        results: Results,
    ) -> None:
        self.args = args
        self.tasks = {task.name: task for task in tasks}
        self.results = results
        self.cells = list(all_cells(args, list(self.tasks)))

    def run(self) -> list[str]:
        """Measure what is not measured yet; the keys of all cells, in their order."""
        keys = {cell.key(self._facts(cell)): cell for cell in self.cells}
        todo = [item for item in keys.items() if not self.results.has(item[0])]
        for engine, group in groupby(todo, lambda item: item[1].engine):
            is_ours = engine == OURS
            with started(
                self.args.model if is_ours else self.args.ar,
                is_diffusion=is_ours,
                server_options=dict(self.args.server_option),
                engine_options=dict(self.args.engine_option),
                dtype=self.args.dtype,
                seed=self.args.seed,
                max_num_seqs=self.args.concurrency,
                # The questions of a task begin alike: their time would depend on which
                # came before.
                enable_prefix_caching=False,
            ) as llm:
                for key, cell in group:
                    print(f"{cell.task}: {cell.engine}, {cell.setting}", flush=True)
                    numbers = self._measured(llm, cell)
                    self.results.add(cell.described() | {"key": key} | numbers)
        return list(keys)

    def _measured(self, llm: LLM, cell: TaskCell) -> dict[str, Any]:
        """The numbers of a cell, by the names in the JSON file."""
        task = self.tasks[cell.task]
        if not isinstance(task, Task):
            return task.measured(llm, self._options(cell, None))
        width = self.args.max_tokens or task.max_tokens
        options = self._options(cell, width)

        def ask(questions: Sequence[Any]) -> Answers:
            return answered(
                llm,
                questions,
                chat=self.args.chat,
                max_tokens=width,
                stop=task.stop,
                options=options,
            )

        # What is compiled or read at the first request is no part of the speed.
        ask(task.questions[:1])
        answers = ask(task.questions)
        if not task.metrics:
            return numbers_of(task.score(answers.texts), answers)
        scores = {name: score(answers.texts) for name, score in task.metrics.items()}
        metric = next(iter(scores))
        return numbers_of(scores[metric], answers) | {
            "metric": metric,
            "metrics": {name: mean(found) for name, found in scores.items()},
        }

    def _options(self, cell: TaskCell, width: int | None) -> dict[str, Any]:
        """What a request of a cell asks for.

        Args:
            width: most tokens of its answer; None where each request has its own.
        """
        if cell.engine == AUTOREGRESSIVE:
            return {}
        options: dict[str, Any] = {
            "strategy": cell.strategy,
            "strategy_config": dict(cell.strategy_config),
            "cache": cell.cache,
            "cache_config": dict(cell.cache_config),
        }
        if self.args.block_length is not None:
            options["block_length"] = self.args.block_length
        per_step = cell.tokens_per_step or 1
        # One token per step is what a request has that does not say.
        if width is not None and per_step > 1:
            options["steps"] = -(-width // per_step)
        return options

    def _facts(self, cell: TaskCell) -> Mapping[str, Any]:
        """What of the arguments a cell's result depends on."""
        args = self.args
        model = args.model if cell.engine == OURS else args.ar
        server = args.server_option if cell.engine == OURS else []
        data = dict(args.data)
        return {
            "limit": args.limit,
            "shots": args.shots,
            "chat": args.chat,
            "max_tokens": args.max_tokens,
            "block_length": args.block_length,
            "samples": args.samples,
            "text_metrics": args.text_metrics,
            "seed": args.seed,
            # What names and folders do not tell apart.
            "inputs": digest([model, data.get(cell.task), args.include_path]),
            "options": digest([server, args.engine_option]),
        }
