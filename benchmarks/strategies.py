# SPDX-License-Identifier: Apache-2.0
"""Compare all strategies on llada-tiny: accuracy, forwards, tokens per forward."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.engine import DTYPE, RowCounter, start_engine
from benchmarks.settings import LEFT_OUT, SETTINGS, WORKLOADS, Setting, Workload
from benchmarks.tables import ROOT, hardware, save, served_facts
from vllm_dlm.tasks.evaluation import Served, evaluate_served
from vllm_dlm.tasks.problems import sample_problems

REQUESTS_AT_A_TIME = 32
READING = "<!-- reading -->"
DOCUMENT = """\
# The strategies compared

Measured by `{command}`: the built-in
llada-tiny (1.1 M parameters), {problems} held-out problems per row, the same for all
rows of a table, or the first of them where a row says so; greedy, cache `none`, at most
{requests} requests at a time. Blocks of 32, but for strategies of the whole canvas. On
{hardware}, vLLM {vllm}, {dtype}.

- **forwards**: per request, until its end of text is final. A forward is one call of
  the model, however much it computes: `freedave` evaluates several drafts in one.
- **tokens per forward**: tokens of the answers, with their end of text, over forwards.
  The padding behind it does not count, though it has to be written.
- **rows**: per request, positions that go through the network, the prompt's and drafts'
  included: what a forward computes. Like the other columns, rows do not depend on the
  machine but for rounding.
- `*`: no other row of the table is as good in accuracy and in tokens per forward, and
  better in one of them.

{left_out}

{tables}

"""


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
        return self.rows / self.served.problems

    def beaten_by(self, other: Row) -> bool:
        """Whether another row is as good in both respects, and better in one."""
        mine = (self.served.accuracy, self.served.tokens_per_forward)
        theirs = (other.served.accuracy, other.served.tokens_per_forward)
        at_least = all(his >= my for his, my in zip(theirs, mine, strict=True))
        return at_least and theirs != mine


def main() -> int:
    """Measure, and write the tables."""
    args = _arguments()
    # The scheduler must be here, to be asked for its rows.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    settings = [
        setting
        for setting in SETTINGS
        if args.strategies is None or setting.strategy in args.strategies
    ]
    rows = _earlier(args.json) if args.resume else []
    with tempfile.TemporaryDirectory() as folder:
        llm = start_engine(
            folder,
            max_num_seqs=REQUESTS_AT_A_TIME,
            # Enough rows for the drafts of all requests.
            max_num_batched_tokens=65536,
            # Nothing is timed: to compile each strategy would take longer than to ask.
            enforce_eager=True,
        )
        counter = RowCounter(llm)
        total = sum(one.is_measured(work) for work in WORKLOADS for one in settings)
        with tqdm(total=total, unit="row") as progress:
            for workload in WORKLOADS:
                for row in _measure(
                    llm, counter, workload, settings, args.num_problems, rows
                ):
                    progress.set_postfix_str(row.setting.strategy)
                    progress.update()
                    rows.append(row)
                    save([_facts(row) for row in rows], args.json)
        llm.llm_engine.engine_core.shutdown()
    _write(args.table, _document(rows))
    print(f"{len(rows)} rows -> {args.table}, {args.json}")
    return 0


def _measure(
    llm: Any,
    counter: RowCounter,
    workload: Workload,
    settings: list[Setting],
    num_problems: int,
    earlier: list[Row],
) -> Iterator[Row]:
    done = [(row.workload, row.setting) for row in earlier]
    problems = sample_problems(num_problems, 0, "heldout", workload.tasks)
    for setting in settings:
        if not setting.is_measured(workload) or (workload, setting) in done:
            continue
        options = setting.request_options(workload)
        some = problems[: setting.most_problems(workload)]
        before = counter.rows
        answers = evaluate_served(
            llm, some, options, max_tokens=workload.canvas, progress=False
        )
        yield Row(setting, workload, answers, counter.rows - before)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.strategies", description=__doc__
    )
    parser.add_argument(
        "--num-problems",
        type=int,
        default=200,
        help="held-out problems per row (default: %(default)s)",
    )
    parser.add_argument(
        "--strategies",
        nargs="+",
        choices=sorted({setting.strategy for setting in SETTINGS}),
        metavar="NAME",
        help="only these",
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=ROOT / "runs/strategies.json",
        help="all numbers, written after each row (default: %(default)s)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the rows of --json: measure only those that it lacks",
    )
    parser.add_argument(
        "--table",
        type=Path,
        default=ROOT / "docs/strategy_table.md",
        help=f"markdown; what follows its line {READING} stays (default: %(default)s)",
    )
    return parser.parse_args()


# -- what is written ------------------------------------------------------


def _facts(row: Row) -> dict[str, Any]:
    return {
        **asdict(row.setting),
        "label": row.setting.label,
        "workload": row.workload.title,
        "rows": row.rows,
        **served_facts(row.served),
        "tokens_per_forward": row.served.tokens_per_forward,
        "rows_per_request": row.rows_per_request,
    }


def _earlier(path: Path) -> list[Row]:
    """The rows of a file, as far as they are measured still."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    facts = {
        (each["workload"], each["strategy"], each["label"]): each for each in found
    }
    return [
        Row(
            setting,
            workload,
            Served(**{field.name: each[field.name] for field in fields(Served)}),
            each["rows"],
        )
        for workload in WORKLOADS
        for setting in SETTINGS
        if (each := facts.get((workload.title, setting.strategy, setting.label)))
    ]


def _write(path: Path, document: str) -> None:
    """Write the document; the reading behind it, made by hand, stays."""
    reading = "\n"
    if path.is_file():
        reading = path.read_text(encoding="utf-8").partition(READING)[2] or reading
    path.write_text(document + READING + reading, encoding="utf-8")


def _document(rows: list[Row]) -> str:
    """The document up to the reading."""
    import vllm

    tables = [
        f"## {workload.title}\n\n{_share(workload)}{_table(rows, workload)}"
        for workload in WORKLOADS
        if any(row.workload == workload for row in rows)
    ]
    left_out = [f"`{name}` is left out: {why}." for name, why in LEFT_OUT.items()]
    return DOCUMENT.format(
        command=" ".join(
            each
            for each in ["python -m benchmarks.strategies", *sys.argv[1:]]
            if each != "--resume"
        ),
        problems=rows[0].served.problems,
        requests=REQUESTS_AT_A_TIME,
        hardware=hardware(),
        vllm=vllm.__version__,
        dtype=DTYPE,
        left_out="\n".join(left_out),
        tables="\n\n".join(tables),
    )


def _share(workload: Workload) -> str:
    """How many of the problems a table is about, where not all."""
    most = workload.most_problems
    return f"The first {most} problems, and strategies by default.\n\n" if most else ""


def _table(rows: list[Row], workload: Workload) -> str:
    """One workload, the most tokens per forward first."""
    rows = [row for row in rows if row.workload == workload]
    rows.sort(key=lambda row: (-row.served.tokens_per_forward, -row.served.accuracy))
    most = max((row.served.problems for row in rows), default=0)
    lines = [
        "| strategy | setting | accuracy | forwards | tokens per forward | rows | |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        name, served = row.setting.strategy, row.served
        best = not any(row.beaten_by(other) for other in rows)
        label = row.setting.label
        if served.problems < most:
            label += f" ({served.problems} problems)"
        cells = [
            f"[{name}](strategies/{name}.md)",
            label,
            f"{served.accuracy:.1%}",
            f"{served.forwards_per_request:.2f}",
            f"{served.tokens_per_forward:.2f}",
            f"{row.rows_per_request:,.0f}",
            "*" if best else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
