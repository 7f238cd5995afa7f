# SPDX-License-Identifier: Apache-2.0
"""Results as one table in the terminal, and as one picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from vllm_dlm.bench.aup import scores
from vllm_dlm.bench.report import check_plotting
from vllm_dlm.evaluation.cells import AUTOREGRESSIVE
from vllm_dlm.evaluation.engines import speeds
from vllm_dlm.files.whole_files import replacing

Result = Mapping[str, Any]

MEAN = "mean"
"""In place of a task's name: all tasks of a setting together."""


def with_means(cells: Sequence[Result]) -> list[Result]:
    """The cells and, where there are several tasks, the mean of each setting.

    Accuracy is the mean over tasks; tokens, forwards and seconds are sums.
    """
    tasks = {cell["task"] for cell in cells}
    settings: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for cell in cells:
        settings[cell["engine"], cell["setting"]].append(cell)
    means: list[Result] = []
    for of_setting in settings.values():
        if len(tasks) == 1 or len(of_setting) != len(tasks):
            continue
        tokens, forwards, seconds = (
            sum(cell[name] for cell in of_setting)
            for name in ("tokens", "forwards", "seconds")
        )
        errors = [cell["accuracy_error"] for cell in of_setting]
        known = None if None in errors else sum(e * e for e in errors) ** 0.5
        means.append(
            {
                **of_setting[0],
                "task": MEAN,
                "accuracy": mean(cell["accuracy"] for cell in of_setting),
                "accuracy_error": None if known is None else known / len(errors),
                "questions": sum(cell["questions"] for cell in of_setting),
                **speeds(tokens, forwards, seconds),
            }
        )
    return [*cells, *means]


def rows(cells: Sequence[Result]) -> list[list[str]]:
    """What the table shows of each cell, in the order of `HEADINGS`."""
    found = []
    judged = {
        task: {
            score.method: score.aup
            for score in scores([cell for cell in cells if cell["task"] == task])
        }
        for task in {cell["task"] for cell in cells}
    }
    for cell in cells:
        cache = cell["setting"].rpartition(", ")[2]
        method = f"{cell['engine']}: {cell['strategy']}, {cache}"
        found.append(
            [
                cell["task"],
                cell["engine"],
                cell["setting"],
                str(cell["questions"]),
                _number(cell["accuracy"], 1, 100),
                _number(cell["accuracy_error"], 1, 100),
                _number(cell["tokens_per_forward"], 2),
                _number(cell["tokens_per_second"], 1),
                _number(judged[cell["task"]].get(method), 1),
            ]
        )
    return found


HEADINGS = (
    *("task", "engine", "setting", "questions", "accuracy %", "±"),
    *("tokens/forward", "tokens/s", "AUP"),
)


def _number(value: float | None, digits: int, factor: float = 1.0) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"


def print_table(cells: Sequence[Result]) -> None:
    """Print results, and the means over tasks."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Rather let a narrow terminal break lines than cut numbers.
    console = Console(width=1000, highlight=False)
    table = Table(box=None, pad_edge=False)
    for name in HEADINGS:
        is_text = name in HEADINGS[:3]
        table.add_column(name, justify="left" if is_text else "right", no_wrap=is_text)
    for row in rows(with_means(cells)):
        table.add_row(*map(Text, row))
    console.print(table)


def plot(cells: Sequence[Result], path: Path) -> None:
    """Draw accuracy over tokens per forward: a line for each strategy and cache.

    With several tasks, their mean. An autoregressive model is a horizontal line.
    """
    check_plotting()
    from matplotlib.figure import Figure

    several = len({cell["task"] for cell in cells}) > 1
    shown = [c for c in with_means(cells) if not several or c["task"] == MEAN]
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for cell in shown:
        accuracy = 100 * cell["accuracy"]
        if cell["engine"] == AUTOREGRESSIVE:
            axes.axhline(accuracy, color="grey", linestyle="--", label=AUTOREGRESSIVE)
        elif cell["tokens_per_forward"] is not None:
            cache = cell["setting"].rpartition(", ")[2]
            name = f"{cell['strategy']}, {cache}"
            lines[name].append((cell["tokens_per_forward"], accuracy))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    what = f"mean accuracy of {len({c['task'] for c in cells})} tasks"
    only = f"accuracy, {cells[0]['task']}"
    axes.set(xlabel="tokens per forward", ylabel=f"{what if several else only}, %")
    figure.legend(loc="outside lower center", fontsize="small", ncols=2)
    with replacing(path) as part:
        # The new file's name has no ending to tell the format by.
        figure.savefig(part, dpi=150, format=path.suffix[1:] or "png")
