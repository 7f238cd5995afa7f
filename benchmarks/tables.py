# SPDX-License-Identifier: Apache-2.0
"""Tables in documents: where they go, what is kept of them, what they were made on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.engine import DTYPE
from vllm_dlm.tasks.evaluation import Served

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("<!-- measured -->", "<!-- reading -->")
"""Lines of a document between which its tables are; what is read in them follows."""


def table_parser(
    name: str,
    description: str | None,
    document: str,
    *,
    num_problems: int,
    lines: tuple[str, str] = MEASURED,
) -> argparse.ArgumentParser:
    """A parser of what all programs take that write tables into a document.

    Args:
        name: of the program: `python -m benchmarks.NAME`.
        document: the document that it writes into by default, below the root.
        num_problems: held-out problems of a row by default.
        lines: as `write_between` takes them.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--num-problems",
        type=int,
        default=num_problems,
        help="held-out problems per row, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=ROOT / f"runs/{name}.json",
        help="all numbers, written after each row (default: %(default)s)",
    )
    parser.add_argument(
        "--document",
        type=Path,
        default=ROOT / document,
        help=f"markdown file with the lines {lines[0]} and {lines[1]}, between which "
        "the tables go (default: %(default)s)",
    )
    return parser


def save(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write all numbers so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def served_facts(served: Served) -> dict[str, Any]:
    """The numbers of what was served, and what follows from them."""
    return {
        **asdict(served),
        "accuracy": served.accuracy,
        "forwards_per_request": served.forwards_per_request,
    }


def write_between(path: Path, lines: tuple[str, str], text: str) -> None:
    """Put a text between two lines of a document.

    Raises:
        ValueError: the document has no such lines.
    """
    head, begin, rest = path.read_text(encoding="utf-8").partition(lines[0])
    _, end, reading = rest.partition(lines[1])
    if not begin or not end:
        raise ValueError(f"{path} has no lines {lines[0]} and {lines[1]}")
    path.write_text(f"{head}{begin}\n\n{text}\n\n{end}{reading}", encoding="utf-8")


def measured_by(name: str) -> str:
    """The command that repeats a table, and what this one was made on."""
    import vllm

    command = " ".join([f"python -m benchmarks.{name}", *sys.argv[1:]])
    made = f"{hardware()}, vLLM {vllm.__version__}, {DTYPE}"
    return f"Measured by `{command}` on {made}"


def hardware() -> str:
    """The GPU, or the cores and name of the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"{len(os.sched_getaffinity(0))} cores, {(names or [platform.machine()])[0]}"
