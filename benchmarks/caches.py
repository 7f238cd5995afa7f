# SPDX-License-Identifier: Apache-2.0
"""Compare the cache policies on llada-tiny: accuracy, forwards, rows computed."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.engine import start_engine
from benchmarks.strategies import hardware
from vllm_dlm.config.cache import POLICIES
from vllm_dlm.tasks.evaluation import Served, evaluate_served
from vllm_dlm.tasks.problems import sample_problems

ROOT = Path(__file__).resolve().parents[1]
REQUESTS_AT_A_TIME = 32
BEGIN, END = "<!-- measured -->", "<!-- reading -->"
"""Lines of the document between which this command writes."""


@dataclass(frozen=True)
class Workload:
    """Requests that all policies serve."""

    title: str
    canvas: int
    options: dict[str, Any]
    """The requests' own, but for `cache`."""
    most_problems: int = 200
    """Fewer where each request takes hundreds of forwards."""


ONE_A_STEP = {"strategy": "static", "block_length": 32}
WORKLOADS = [
    Workload("`static`, one token per step, canvas 256, block 32", 256, ONE_A_STEP),
    Workload(
        "`threshold` 0.9, canvas 256, block 32",
        256,
        {"strategy": "threshold", "block_length": 32},
    ),
    Workload(
        "`static`, one token per step, canvas 128 as one block",
        128,
        {"strategy": "static", "block_length": "canvas"},
        most_problems=100,
    ),
]


@dataclass(frozen=True)
class Setting:
    """A policy, and what of its parameters is not the default."""

    cache: str
    config: dict[str, int] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """As the tables name it."""
        return ", ".join(
            [f"`{self.cache}`", *(f"{k} {v}" for k, v in self.config.items())]
        )


SETTINGS = [
    *(Setting(name) for name in POLICIES),
    # What the default owes to steps that compute everything.
    Setting("vicinity", {"warmup_steps": 0}),
    Setting("window", {"refresh_every": 4}),
]


@dataclass(frozen=True)
class Row:
    """One setting on one workload."""

    setting: Setting
    workload: Workload
    served: Served
    rows: int
    """Rows (positions) that went through the network, of all requests."""

    @property
    def rows_per_request(self) -> float:
        """Rows of one request, on average."""
        return self.rows / self.served.problems


class RowCounter:
    """Counts the rows of every forward that an engine in this process schedules."""

    def __init__(self, llm: Any) -> None:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self.rows = 0
        schedule = scheduler.schedule

        def counted(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.rows += output.total_num_scheduled_tokens
            return output

        scheduler.schedule = counted


def main() -> int:
    """Measure, and write the tables."""
    args = _arguments()
    # The scheduler must be here, to be asked for its rows.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        llm = start_engine(folder, max_num_seqs=REQUESTS_AT_A_TIME)
        counter = RowCounter(llm)
        with tqdm(total=len(WORKLOADS) * len(SETTINGS), unit="row") as progress:
            for workload in WORKLOADS:
                count = min(args.num_problems, workload.most_problems)
                problems = sample_problems(count, 0, "heldout")
                for setting in SETTINGS:
                    progress.set_postfix_str(setting.cache)
                    before = counter.rows
                    options = workload.options | {
                        "cache": setting.cache,
                        "cache_config": setting.config,
                    }
                    served = evaluate_served(
                        llm,
                        problems,
                        options,
                        max_tokens=workload.canvas,
                        progress=False,
                    )
                    rows.append(Row(setting, workload, served, counter.rows - before))
                    progress.update()
                    _save(rows, args.json)
        llm.llm_engine.engine_core.shutdown()
    _write(args.document, _tables(rows))
    print(f"{len(rows)} rows -> {args.document}, {args.json}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.caches", description=__doc__
    )
    parser.add_argument(
        "--num-problems",
        type=int,
        default=200,
        help="held-out problems per row, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=ROOT / "runs/caches.json",
        help="all numbers, written after each row (default: %(default)s)",
    )
    parser.add_argument(
        "--document",
        type=Path,
        default=ROOT / "docs/caches.md",
        help=f"markdown file with the lines {BEGIN} and {END}, between which the "
        "tables go (default: %(default)s)",
    )
    return parser.parse_args()


# -- what is written ------------------------------------------------------


def _save(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = [
        {
            "setting": asdict(row.setting),
            "workload": asdict(row.workload),
            **asdict(row.served),
            "accuracy": row.served.accuracy,
            "forwards_per_request": row.served.forwards_per_request,
            "rows_per_request": row.rows_per_request,
        }
        for row in rows
    ]
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _write(path: Path, tables: str) -> None:
    """Put the tables between the document's two lines.

    Raises:
        ValueError: it has no such lines.
    """
    head, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, reading = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no lines {BEGIN} and {END}")
    path.write_text(f"{head}{BEGIN}\n\n{tables}\n\n{END}{reading}", encoding="utf-8")


def _tables(rows: list[Row]) -> str:
    import vllm

    command = " ".join(["python -m benchmarks.caches", *sys.argv[1:]])
    about = f"""\
Measured by `{command}` on {hardware()}, vLLM {vllm.__version__}, bfloat16:
the built-in llada-tiny (1.1 M parameters), greedy, at most {REQUESTS_AT_A_TIME}
requests at a time, by default or as said. Rows are positions that go through
the network, prompts included."""
    parts = [about]
    for workload in WORKLOADS:
        parts.append(
            _table(workload, [row for row in rows if row.workload == workload])
        )
    return "\n\n".join(parts)


def _table(workload: Workload, rows: list[Row]) -> str:
    """One workload; the first row is what the others are compared with."""
    lines = [
        f"**{workload.title}** ({rows[0].served.problems} problems)",
        "",
        "| policy | accuracy | forwards per request | rows per request | of `none` |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [
            row.setting.label,
            f"{row.served.accuracy:.1%}",
            f"{row.served.forwards_per_request:.2f}",
            f"{row.rows_per_request:,.0f}",
            f"{row.rows_per_request / rows[0].rows_per_request:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
