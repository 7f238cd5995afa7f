# SPDX-License-Identifier: Apache-2.0
"""Measure on llada-tiny what published systems rest on, part by part, side by side."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
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
from vllm_dlm.tasks.evaluation import Served, evaluate_served
from vllm_dlm.tasks.problems import sample_problems

REQUESTS_AT_A_TIME = 32


@dataclass(frozen=True)
class Item:
    """One published system: the base that its paper compares with, then its parts."""

    title: str
    canvas: int
    rows: dict[str, dict[str, Any]]
    """Label -> options of the requests; the first is what others are compared with."""
    most_problems: int = 200
    """Fewer where requests take hundreds of forwards."""


def preset(strategy: str, name: str, **options: Any) -> dict[str, Any]:
    """Options of a strategy with one of its presets."""
    return {"strategy": strategy, "strategy_config": {"preset": name}, **options}


STATIC = {"strategy": "static"}
ITEMS = [
    Item(
        "Learn2PD and EoTP",
        1024,
        {
            "`static`": STATIC,
            "`static`, `eotp` `block`": STATIC | {"eotp": "block"},
            "`static`, `eotp` `canvas`": STATIC | {"eotp": "canvas"},
            "`learn2pd` without `eotp`": {"strategy": "learn2pd", "eotp": "off"},
            "`learn2pd`, `eotp` `block`": {"strategy": "learn2pd"},
            "`learn2pd`, `eotp` `canvas`": {"strategy": "learn2pd", "eotp": "canvas"},
            "the same, cache `dual`": {
                "strategy": "learn2pd",
                "eotp": "canvas",
                "cache": "dual",
            },
        },
        most_problems=16,
    ),
    Item(
        "Presets of rules that write by confidence",
        256,
        {
            "`static`": STATIC,
            **{
                f"`{strategy}`, `preset` `{name}`": preset(strategy, name)
                for strategy, name in (
                    ("cad", "default"),
                    ("cad", "paper"),
                    ("cad", "code"),
                    ("hierarchy", "default"),
                    ("hierarchy", "paper"),
                    ("eb", "default"),
                    ("eb", "paper"),
                    ("klass", "default"),
                    ("klass", "llada_gsm8k"),
                    ("credit", "default"),
                    ("credit", "parameter_free"),
                    ("slowfast", "default"),
                    ("slowfast", "code"),
                )
            },
        },
        most_problems=100,
    ),
    Item(
        "FreeDave",
        128,
        {
            "`static`": STATIC,
            "`freedave`, `preset` `llada`": preset("freedave", "llada"),
            "`freedave`, `preset` `dream`": preset("freedave", "dream"),
            "`static`, cache `dual`": STATIC | {"cache": "dual"},
            "`freedave`, cache `dual`": preset("freedave", "llada", cache="dual"),
            "`threshold` .95": {
                "strategy": "threshold",
                "strategy_config": {"threshold": 0.95},
            },
            "`freedave`, `preset` `llada_plus`": preset("freedave", "llada_plus"),
        },
        most_problems=50,
    ),
    Item(
        "Window-Diffusion",
        256,
        {
            "`static`, canvas as one block": STATIC | {"block_length": "canvas"},
            "the same, cache `window`": STATIC
            | {"block_length": "canvas", "cache": "window"},
        },
        most_problems=32,
    ),
    Item(
        "Prophet",
        64,
        {
            "`static`": STATIC,
            "`prophet`, `preset` `paper`": preset("prophet", "paper"),
            "`prophet`, all thresholds 10": {
                "strategy": "prophet",
                "strategy_config": {"early": 10.0, "middle": 10.0, "late": 10.0},
            },
            "`threshold`": {"strategy": "threshold"},
        },
        most_problems=100,
    ),
    Item(
        "LLaDA2.1's editing, on a model that was not trained for it",
        64,
        {
            "`joint` without edits": {
                "strategy": "joint",
                "strategy_config": {"edit": False},
            },
            "`joint`, `preset` `quality`": preset("joint", "quality"),
            "`joint`, `preset` `speed`": preset("joint", "speed"),
            "the same, `penalty` 3": {
                "strategy": "joint",
                "strategy_config": {"preset": "speed", "penalty": 3.0},
            },
        },
        most_problems=100,
    ),
]


@dataclass(frozen=True)
class Row:
    """One part of a system."""

    item: str
    label: str
    served: Served
    rows: int
    """Rows (positions) that went through the network, of all requests."""

    @property
    def rows_per_request(self) -> float:
        return self.rows / self.served.problems


def main() -> int:
    """Measure, and write the tables."""
    args = _arguments()
    # The scheduler must be here, to be asked for its rows.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    items = [item for item in ITEMS if args.items is None or item.title in args.items]
    rows: list[Row] = []
    progress = tqdm(total=sum(len(item.rows) for item in items), unit="row")
    with tempfile.TemporaryDirectory() as folder:
        llm = start_engine(
            folder, max_num_seqs=REQUESTS_AT_A_TIME, max_num_batched_tokens=65536
        )
        counter = RowCounter(llm)
        for item in items:
            for row in _measure(llm, counter, item, args.num_problems):
                progress.set_postfix_str(row.label)
                progress.update()
                rows.append(row)
                save([_facts(row) for row in rows], args.json)
        llm.llm_engine.engine_core.shutdown()
    progress.close()
    write_between(args.document, MEASURED, _tables(rows, items))
    print(f"{len(rows)} rows -> {args.document}, {args.json}")
    return 0


def _measure(llm: Any, counter: RowCounter, item: Item, most: int) -> list[Row]:
    problems = sample_problems(min(most, item.most_problems), 0, "heldout")
    measured = []
    for label, options in item.rows.items():
        before = counter.rows
        served = evaluate_served(
            llm, problems, options, max_tokens=item.canvas, progress=False
        )
        measured.append(Row(item.title, label, served, counter.rows - before))
    return measured


def _arguments() -> argparse.Namespace:
    parser = table_parser("fidelity", __doc__, "docs/fidelity.md", num_problems=200)
    parser.add_argument(
        "--items",
        nargs="+",
        choices=[item.title for item in ITEMS],
        metavar="TITLE",
        help="only these",
    )
    return parser.parse_args()


# -- what is written ------------------------------------------------------


def _facts(row: Row) -> dict[str, Any]:
    return {
        **asdict(row),
        **served_facts(row.served),
        "rows_per_request": row.rows_per_request,
    }


def _tables(rows: list[Row], items: list[Item]) -> str:
    about = f"""\
{measured_by("fidelity")}:
the built-in llada-tiny (1.1 M parameters), greedy, blocks of 32 or as said, at most
{REQUESTS_AT_A_TIME} requests at a time. Rows are positions that go through the network,
prompts included; "fewer" is against the first line."""
    parts = [about]
    for item in items:
        parts.append(_table(item, [row for row in rows if row.item == item.title]))
    return "\n\n".join(parts)


def _table(item: Item, rows: list[Row]) -> str:
    """One system; its first row is what the others are compared with."""
    base = rows[0]
    lines = [
        f"**{item.title}**, canvas {item.canvas} ({base.served.problems} problems)",
        "",
        "| | accuracy | forwards per request | fewer | rows per request | fewer |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        forwards = row.served.forwards_per_request
        cells = [
            row.label,
            f"{row.served.accuracy:.1%}",
            f"{forwards:.2f}",
            f"{base.served.forwards_per_request / forwards:.1f}x",
            f"{row.rows_per_request:,.0f}",
            f"{base.rows_per_request / row.rows_per_request:.1f}x",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
