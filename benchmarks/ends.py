# SPDX-License-Identifier: Apache-2.0
"""Compare how wide canvases are served on llada-tiny: right answers, forwards, rows.

Learn2PD's largest speed-ups are those of short answers on a canvas of 1024, where most
of the published loop's work is padding. The first row is that loop: one token per
forward to the end of the canvas, each forward of all rows. Its cost is arithmetic, and
its answers are those of `static` here, which stops where the text ends.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm import tqdm

from benchmarks.engine import RowCounter, start_engine
from benchmarks.tables import measured_by, save, table_parser, write_between
from vllm_dlm.tasks.evaluation import Served, evaluate_served
from vllm_dlm.tasks.problems import Problem, sample_problems

REQUESTS_AT_A_TIME = 16
LONGEST_PROMPT = 128
LINES = ("<!-- ends -->", "<!-- end of ends -->")
"""Lines of the document between which this command writes."""


@dataclass(frozen=True)
class Setting:
    """How the problems are answered."""

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    """The requests' own, beside the block length."""


STATIC = Setting("`static`", {"strategy": "static", "eotp": "off"})
SETTINGS = [
    STATIC,
    *(
        Setting(
            f"`{strategy}`, `eotp` {eotp}"
            + (f", cache `{cache}`" if cache != "none" else ""),
            {"strategy": strategy, "eotp": eotp, "cache": cache},
        )
        for strategy in ("threshold", "learn2pd")
        for cache, modes in (
            ("none", ("off", "block", "canvas")),
            ("dual", ("block", "canvas")),
        )
        for eotp in modes
    ),
    *(
        Setting(
            f"`threshold`, `growth` {growth}, `eotp` canvas",
            {"strategy": "threshold", "growth": growth, "eotp": "canvas"},
        )
        for growth in ("daedal", "rho_eos")
    ),
]


@dataclass(frozen=True)
class Row:
    """What one setting took."""

    label: str
    problems: int
    right: int
    forwards: float
    """Per request."""
    rows: float
    """Rows (positions) through the network, per request."""


def published(served: Row, prompts: float, canvas: int) -> Row:
    """The published loop, given what it answers.

    Args:
        served: `static`, which stops at the end of the text.
        prompts: positions of a prompt, on average.
        canvas: its width.
    """
    label = "`static`, the published loop"
    rows = canvas * (prompts + canvas)
    return Row(label, served.problems, served.right, canvas, rows)


def main() -> int:
    """Measure, and write the table."""
    args = _arguments()
    # The scheduler must be here, to be asked for its rows.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    length = args.canvas + LONGEST_PROMPT
    problems = sample_problems(args.num_problems, 0, "heldout")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        llm = start_engine(
            folder,
            max_num_seqs=REQUESTS_AT_A_TIME,
            max_model_len=length,
            hf_overrides={"max_sequence_length": length},
            dlm_max_canvas=args.canvas,
        )
        prompts = _mean_prompt(llm, problems)
        counter = RowCounter(llm)
        for setting in tqdm(SETTINGS, unit="row"):
            before = counter.rows
            served = evaluate_served(
                llm,
                problems,
                {"block_length": args.block_length, **setting.options},
                max_tokens=args.canvas,
                progress=False,
            )
            rows.append(_row(setting, served, counter.rows - before))
            if setting is STATIC:
                rows.insert(0, published(rows[0], prompts, args.canvas))
            save([asdict(row) for row in rows], args.json)
        llm.llm_engine.engine_core.shutdown()
    write_between(args.document, LINES, _table(rows, args.canvas, args.block_length))
    print(f"{len(rows)} rows -> {args.document}, {args.json}")
    return 0


def _row(setting: Setting, served: Served, rows: int) -> Row:
    return Row(
        setting.label,
        served.problems,
        served.right,
        served.forwards_per_request,
        rows / served.problems,
    )


def _mean_prompt(llm: Any, problems: list[Problem]) -> float:
    tokenizer = llm.get_tokenizer()
    lengths = [len(tokenizer.encode(problem.question)) for problem in problems]
    return sum(lengths) / len(lengths)


def _arguments() -> argparse.Namespace:
    parser = table_parser(
        "ends", __doc__, "docs/strategies/learn2pd.md", num_problems=100, lines=LINES
    )
    parser.add_argument(
        "--canvas",
        type=int,
        default=1024,
        help="positions of a canvas, and most tokens of an answer (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--block-length",
        type=int,
        default=32,
        help="positions of a block; in shorter ones answers take several (default: "
        "%(default)s)",
    )
    return parser.parse_args()


# -- what is written ------------------------------------------------------


def _table(rows: list[Row], canvas: int, block: int) -> str:
    """The rows; the first is what the others are compared with."""
    first = rows[0]
    about = f"""\
{measured_by("ends")}: the built-in
llada-tiny, {first.problems} held-out problems, greedy, canvas {canvas}, block {block}.
Rows are positions that go through the network, prompts included. The first row is
computed: each of the {canvas} forwards of the published loop has all rows."""
    lines = [
        about,
        "",
        "| | right | forwards per request | fewer by | rows per request | fewer by |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [
            row.label,
            f"{row.right / row.problems:.1%}",
            f"{row.forwards:,.1f}",
            f"{first.forwards / row.forwards:.1f}x",
            f"{row.rows:,.0f}",
            f"{first.rows / row.rows:.1f}x",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
