# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness in a run of `vllm-dlm eval`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from vllm_dlm.messages import closest

if TYPE_CHECKING:
    from vllm import LLM

PREFIX = "lm-eval:"


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-eval's, by its name there."""

    name: str
    """With `PREFIX`."""
    args: argparse.Namespace

    def measured(self, llm: LLM, options: Mapping[str, Any]) -> dict[str, Any]:
        """Ask the task; a cell's numbers, by their names in the JSON file.

        Accuracy is the task's first metric of which more is better.

        Args:
            llm: the engine.
            options: of every request, of a diffusion model.

        Raises:
            ValueError: the task has no such metric.
        """
        from lm_eval import simple_evaluate

        from vllm_dlm.evaluation.engines import speeds
        from vllm_dlm.evaluation.lm_eval_model import VllmDlm

        args, own = self.args, self.name.removeprefix(PREFIX)
        model = VllmDlm(
            llm=llm,
            samples=args.samples,
            seed=args.seed,
            request_options=dict(options),
            **({"max_gen_toks": args.max_tokens} if args.max_tokens else {}),
        )
        found: Any = simple_evaluate(
            model,
            tasks=[own],
            num_fewshot=args.shots,
            limit=args.limit,
            apply_chat_template=args.chat,
            task_manager=_manager(args.include_path),
            log_samples=False,
            bootstrap_iters=1000,
        )
        metric, accuracy, error = headline(own, found)
        counts = found["n-samples"]
        asked = [counts[own]] if own in counts else counts.values()
        done = model.answers
        return {
            "accuracy": accuracy,
            "accuracy_error": error,
            "metric": metric,
            "questions": sum(one["effective"] for one in asked),
            **speeds(done.tokens, done.forwards, done.seconds),
        }


def headline(task: str, found: Mapping[str, Any]) -> tuple[str, float, float | None]:
    """A task's main metric: its name, its value, and its standard error.

    Raises:
        ValueError: the task has none of which more is better.
    """
    results = found["results"].get(task) or found.get("groups", {}).get(task, {})
    better = found["higher_is_better"].get(task, {})
    for name, value in results.items():
        metric, comma, filtered = name.partition(",")
        if comma and better.get(metric) and isinstance(value, int | float):
            error = results.get(f"{metric}_stderr,{filtered}")
            is_known = isinstance(error, int | float) and error == error
            return name, float(value), float(error) if is_known else None
    raise ValueError(
        f"{PREFIX}{task}: it has no metric of which more is better "
        f"({', '.join(name for name in results if ',' in name) or 'none at all'}); of "
        "a group without a number of its own, name the tasks"
    )


def harness_tasks(names: list[str], args: argparse.Namespace) -> list[HarnessTask]:
    """Tasks of lm-eval's by name, each known to it.

    Args:
        names: with `PREFIX`.

    Raises:
        ValueError: lm-eval is not installed, or does not know one of them.
    """
    if not names:
        return []
    if find_spec("lm_eval") is None:
        raise ValueError(
            f"{names[0]} needs lm-evaluation-harness: pip install 'vllm-dlm[eval]'"
        )
    manager = _manager(args.include_path)
    known = {*manager.all_subtasks, *manager.all_groups}
    for name in names:
        if name.removeprefix(PREFIX) not in known:
            near = closest(name.removeprefix(PREFIX), known)
            raise ValueError(
                f"{name}: lm-eval has no such task"
                + (f"; did you mean {PREFIX}{near}?" if near else "")
            )
    return [HarnessTask(name, args) for name in names]


def _manager(folder: Any) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if folder is None else str(folder))
