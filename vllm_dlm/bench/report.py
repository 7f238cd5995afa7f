# SPDX-License-Identifier: Apache-2.0
"""Results as a table in the terminal, and as a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dlm.bench.aup import scores
from vllm_dlm.files.whole_files import replacing

if TYPE_CHECKING:
    from rich.table import Table

Result = Mapping[str, Any]

PLAIN = "plain"


def _number(name: str, digits: int, factor: float = 1.0) -> Callable[[Result], str]:
    def show(cell: Result) -> str:
        value = cell.get(name)
        return "-" if value is None else f"{value * factor:.{digits}f}"

    return show


COLUMNS: dict[str, Callable[[Result], str]] = {
    "engine": lambda cell: str(cell["engine"]),
    "setting": lambda cell: str(cell["setting"]),
    "dtype": lambda cell: str(cell["dtype"]),
    "at once": lambda cell: str(cell["concurrency"]),
    "accuracy %": _number("accuracy", 1, 100),
    "tokens/forward": _number("tokens_per_forward", 2),
    "tokens/s": _number("tokens_per_second", 1),
    "CPU s/request": _number("cpu_seconds_per_request", 3),
    "first token ms p50": _number("first_token_p50", 0, 1000),
    "p99": _number("first_token_p99", 0, 1000),
    "per token ms p50": _number("per_token_p50", 1, 1000),
    "p99 ": _number("per_token_p99", 1, 1000),
    "GFLOP/s": _number("gflops", 0),
    "% of peak": lambda cell: _share(cell),
    "sampling %": _number("sampling_seconds", 1, 100),
    "host %": _number("host_seconds", 1, 100),
}
"""Heading -> what stands below it; a column without any number is left out."""


def _count(name: str) -> Callable[[Result], str]:
    def show(cell: Result) -> str:
        counts = cell.get("counts")
        return "-" if counts is None else str(counts[name])

    return show


COSTS: dict[str, Callable[[Result], str]] = {
    **{name: COLUMNS[name] for name in ("engine", "setting", "dtype", "at once")},
    "forwards": _count("forwards"),
    "rows": _count("rows"),
    "lm_head rows": _count("head_rows"),
    "launches/step": _number("launches_per_step", 1),
    "sampling MiB": _number("sampling_mib", 3),
    "held MiB": _number("state_mib", 3),
}
"""The same, of cells with `--step-costs`."""


def _share(cell: Result) -> str:
    if not cell.get("gflops"):
        return "-"
    return f"{100 * cell['gflops'] / cell['peak_gflops']:.0f}"


def _table(
    columns: Mapping[str, Callable[[Result], str]], cells: Sequence[Result]
) -> Table:
    from rich.table import Table

    rows = [{name: show(cell) for name, show in columns.items()} for cell in cells]
    names = [name for name in columns if any(row[name] != "-" for row in rows)]
    table = Table(box=None, pad_edge=False)
    for name in names:
        is_text = name in ("engine", "setting", "dtype")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=is_text)
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def print_table(cells: Sequence[Result]) -> None:
    """Print results, AUP where answers were checked, and the cells that gave none."""
    from rich.console import Console
    from rich.table import Table

    # Rather let a narrow terminal break lines than cut numbers.
    console = Console(width=1000, highlight=False)
    done = [cell for cell in cells if "error" not in cell]
    costed = [cell for cell in done if "launches_per_step" in cell]
    console.print(_table(COLUMNS, done))
    if costed:
        console.print(_table(COSTS, costed))
    judged = scores(done)
    if judged:
        table = Table(box=None, pad_edge=False)
        table.add_column("accuracy under parallelism", no_wrap=True)
        for name in ("at once", "points", "AUP"):
            table.add_column(name, justify="right")
        for score in judged:
            numbers = map(str, (score.at_once, score.points))
            table.add_row(score.method, *numbers, f"{score.aup:.1f}")
        console.print(table)
    for cell in cells:
        if "error" in cell:
            where = (
                f"{cell['engine']}, {cell['setting']}, {cell['concurrency']} at once"
            )
            console.print(f"{where}: {cell['error']}", markup=False)


def check_plotting() -> None:
    """Fail before the work rather than after it.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            "--plot needs matplotlib: pip install 'vllm-dlm[bench]'"
        ) from None


def plot(cells: Sequence[Result], path: Path) -> None:
    """Draw tokens/s over concurrency, and accuracy over tokens per forward.

    The right half is drawn where the workload has answers. An engine measured at one
    concurrency only, such as the plain loop, is a dashed line.
    """
    check_plotting()
    from matplotlib.figure import Figure

    done = [cell for cell in cells if "error" not in cell]
    judged = [cell for cell in done if cell.get("accuracy") is not None]
    figure = Figure(figsize=(11 if judged else 7, 5), layout="constrained")
    axes = figure.subplots(1, 2 if judged else 1, squeeze=False)[0]
    levels = sorted({cell["concurrency"] for cell in done})
    for index, (label, line) in enumerate(_by_line(done).items()):
        line = sorted(line, key=lambda cell: cell["concurrency"])
        speeds = [cell["tokens_per_second"] for cell in line]
        color = f"C{index}"
        if len(line) == 1 and len(levels) > 1:
            axes[0].axhline(speeds[0], color=color, linestyle="--", label=label)
        else:
            at_once = [cell["concurrency"] for cell in line]
            axes[0].plot(at_once, speeds, marker="o", color=color, label=label)
        right = [cell for cell in line if cell in judged]
        if right:
            axes[1].scatter(
                [cell["tokens_per_forward"] for cell in right],
                [100 * cell["accuracy"] for cell in right],
                color=color,
                marker="x" if line[0]["engine"] == PLAIN else "o",
            )
    axes[0].set_xscale("log")
    axes[0].set_xticks(levels, list(map(str, levels)))
    axes[0].minorticks_off()
    axes[0].set(xlabel="requests at once", ylabel="tokens per second", ylim=(0, None))
    if judged:
        axes[1].set(xlabel="tokens per forward", ylabel="accuracy, %")
    figure.legend(loc="outside lower center", fontsize="small", ncols=2)
    with replacing(path) as part:
        # The new file's name has no ending to tell the format by.
        figure.savefig(part, dpi=150, format=path.suffix[1:] or "png")


def _by_line(cells: Sequence[Result]) -> dict[str, list[Result]]:
    """Cells that differ in concurrency only, by what they have in common."""
    lines = defaultdict(list)
    several = len({cell["dtype"] for cell in cells}) > 1
    for cell in cells:
        dtype = f", {cell['dtype']}" if several else ""
        lines[f"{cell['engine']}: {cell['setting']}{dtype}"].append(cell)
    return lines
