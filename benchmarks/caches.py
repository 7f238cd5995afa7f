# SPDX-License-Identifier: Apache-2.0
"""Compare the cache policies on llada-tiny: accuracy, forwards, rows computed."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm import tqdm

from benchmarks.engine import RowCounter, start_engine
from benchmarks.tables import (
    MEASURED,
    measured_by,
    save,
    served_facts,
    table_parser,
    write_between,
)
from vllm_dlm.config.cache import POLICIES
from vllm_dlm.tasks.evaluation import Served, evaluate_served
from vllm_dlm.tasks.problems import sample_problems

REQUESTS_AT_A_TIME = 32


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


def main() -> int:
    """Measure, and write the tables."""
    args = table_parser(
        "caches", __doc__, "docs/caches.md", num_problems=200
    ).parse_args()
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
                    save([_facts(row) for row in rows], args.json)
        llm.llm_engine.engine_core.shutdown()
    write_between(args.document, MEASURED, _tables(rows))
    print(f"{len(rows)} rows -> {args.document}, {args.json}")
    return 0


# -- what is written ------------------------------------------------------


def _facts(row: Row) -> dict[str, Any]:
    return {
        "setting": asdict(row.setting),
        "workload": asdict(row.workload),
        **served_facts(row.served),
        "rows_per_request": row.rows_per_request,
    }


def _tables(rows: list[Row]) -> str:
    about = f"""\
{measured_by("caches")}:
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
