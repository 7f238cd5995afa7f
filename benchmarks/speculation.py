# SPDX-License-Identifier: Apache-2.0
"""Compare ways to draft for an autoregressive model: forwards saved, work done, time.

The built-in llama-tiny answers held-out questions, greedily unless told otherwise:
plain, with vLLM's own methods at fixed lengths, and with ours. vLLM's suffix decoding
takes part where the package arctic-inference is installed. With --model, a model of
yours answers the questions of a file, as chats, with the methods that need no drafter.
Counts do not depend on the machine but for rounding; seconds do.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.answers import (
    Workload,
    answer,
    built_in,
    count_corpus,
    engine,
    from_file,
)
from benchmarks.tables import hardware
from benchmarks.ways_to_draft import Setting, settings


@dataclass(frozen=True)
class Row:
    """What it took to answer all problems; forwards are counted per request."""

    method: str
    label: str
    problems: int
    right: int | None
    same: int
    """Answers that equal those of plain decoding, token by token."""
    tokens: int
    target_forwards: int
    target_rows: int
    drafted: int
    drafter_forwards: int
    """Of the drafter, however many requests each was for."""
    drafter_rows: int
    seconds: float

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.target_forwards

    @property
    def accepted_share(self) -> float:
        """Of the drafted tokens."""
        accepted = self.tokens - self.target_forwards
        return accepted / self.drafted if self.drafted else 0.0


@contextmanager
def counting(llm: Any) -> Iterator[Counter[str]]:
    """Counts what the target and the drafter compute while the context is open."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    runner = worker.model_runner
    counts: Counter[str] = Counter()
    execute = runner.execute_model

    def execute_and_count(output: Any, *args: Any, **kwargs: Any) -> Any:
        drafts = output.scheduled_spec_decode_tokens.values()
        counts["target_forwards"] += len(output.num_scheduled_tokens)
        counts["target_rows"] += output.total_num_scheduled_tokens
        counts["drafted"] += sum(map(len, drafts))
        return execute(output, *args, **kwargs)

    def count_forward(module: Any, args: Any, kwargs: Any) -> None:
        counts["drafter_forwards"] += 1
        counts["drafter_rows"] += len(kwargs["positions"])

    runner.execute_model = execute_and_count
    drafter = getattr(runner, "drafter", None)
    own: Any = getattr(drafter, "counts", Counter())
    before = own.copy()
    hook = None
    if drafter is not None and not hasattr(drafter, "counts"):
        model = getattr(drafter, "model", None)
        if model is not None and hasattr(model, "register_forward_pre_hook"):
            hook = model.register_forward_pre_hook(count_forward, with_kwargs=True)
    yield counts
    runner.execute_model = execute
    if hook is not None:
        hook.remove()
    counts["drafter_forwards"] += own["forwards"] - before["forwards"]
    counts["drafter_rows"] += own["rows"] - before["rows"]


def forget(llm: Any) -> None:
    """Have a drafter that learns from what is served start anew."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    drafter: Any = getattr(worker.model_runner, "drafter", None)
    if hasattr(drafter, "forget"):
        drafter.forget()


def measure(
    setting: Setting,
    workload: Workload,
    plain: list[list[int]] | None,
    requests: int,
    temperature: float,
) -> tuple[Row, list[list[int]]]:
    """One row of the table, and the answers."""
    questions = workload.questions
    with engine(setting.config, requests, **workload.engine_options) as llm:
        # Kernels are compiled at their first use: not in the row's time.
        answer(llm, workload, questions[:2], temperature)
        forget(llm)
        with counting(llm) as counts:
            started = time.monotonic()
            tokens, texts = answer(llm, workload, questions, temperature)
            seconds = time.monotonic() - started
    right = None
    if workload.checks is not None:
        answered = zip(workload.checks, texts, strict=True)
        right = sum(check(text) for check, text in answered)
    pairs = zip(tokens, tokens if plain is None else plain, strict=True)
    row = Row(
        method=setting.method,
        label=setting.label,
        problems=len(questions),
        right=right,
        same=sum(mine == his for mine, his in pairs),
        tokens=sum(map(len, tokens)),
        target_forwards=counts["target_forwards"],
        target_rows=counts["target_rows"],
        drafted=counts["drafted"],
        drafter_forwards=counts["drafter_forwards"],
        drafter_rows=counts["drafter_rows"],
        seconds=seconds,
    )
    return row, tokens


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    heads = [
        "method",
        "setting",
        "accuracy",
        "as plain",
        "tokens per forward",
        "target forwards",
        "target rows",
        "accepted",
        "drafter forwards",
        "drafter rows",
        "seconds",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "--:|" * (len(heads) - 2)]
    for row in rows:
        cells = [
            row.method,
            row.label,
            "" if row.right is None else f"{row.right / row.problems:.1%}",
            f"{row.same} of {row.problems}",
            f"{row.tokens_per_forward:.2f}",
            f"{row.target_forwards / row.problems:.2f}",
            f"{row.target_rows / row.problems:.1f}",
            f"{row.accepted_share:.0%}" if row.drafted else "",
            f"{row.drafter_forwards / row.problems:.2f}"
            if row.drafter_forwards
            else "",
            f"{row.drafter_rows / row.problems:.1f}" if row.drafter_rows else "",
            f"{row.seconds:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, and print the table."""
    args = _arguments()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    workload = (
        from_file(
            args.model, args.questions, args.num_problems, args.max_tokens, args.dtype
        )
        if args.model
        else built_in(args.num_problems, args.dtype, args.earlier)
    )
    deer = {"model": args.drafter, "context": args.context}
    rows: list[Row] = []
    plain = None
    with tempfile.TemporaryDirectory() as name:
        folder = corpus = Path(name)
        if "aded" in (args.methods or ["aded"]):
            corpus = count_corpus(workload, folder)
        chosen = [
            setting
            for setting in settings(
                args.fixed, folder, corpus, workload.has_drafters, deer
            )
            if setting.method in ("plain", *(args.methods or [setting.method]))
        ]
        with tqdm(chosen, unit="setting") as progress:
            for setting in progress:
                progress.set_postfix_str(setting.name)
                row, tokens = measure(
                    setting, workload, plain, args.requests, args.temperature
                )
                plain = tokens if plain is None else plain
                rows.append(row)
                if args.json:
                    facts = [asdict(row) for row in rows]
                    args.json.write_text(json.dumps(facts, indent=1) + "\n")
    print(
        f"{workload.model}, {len(workload.questions)} questions, {args.requests} at a "
        f"time, {args.dtype}, temperature {args.temperature:g}; {hardware()}\n"
    )
    print(table(rows))
    return 0


def add_load(parser: argparse.ArgumentParser) -> None:
    """Add how many questions are asked, and how many at a time."""
    parser.add_argument(
        "--num-problems",
        type=int,
        default=200,
        help="questions per row (default: %(default)s)",
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=1,
        help="requests at a time (default: %(default)s)",
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculation", description=__doc__
    )
    add_load(parser)
    parser.add_argument(
        "--fixed",
        type=int,
        nargs="+",
        default=[2, 4, 8, 16],
        metavar="K",
        help="draft lengths of vLLM's own methods (default: 2 4 8 16)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[
            *("ngram", "suffix", "draft_model", "parallel"),
            *("specdec++", "deer", "del", "aded"),
        ],
        metavar="NAME",
        help="only these, beside plain decoding",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="default: %(default)s"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="in bfloat16 one row and several round differently, and texts may differ "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--drafter",
        default="deer-tiny",
        help="of the method deer: folder or alias (default: %(default)s)",
    )
    parser.add_argument(
        "--context",
        default="auto",
        choices=["auto", "recompute", "cached"],
        help="of the method deer (default: %(default)s)",
    )
    parser.add_argument(
        "--earlier",
        type=int,
        default=0,
        metavar="N",
        help="questions asked and answered before in the same chat, for longer prompts "
        "of llama-tiny (default: %(default)s)",
    )
    own = parser.add_argument_group("a model of yours")
    own.add_argument("--model", help="folder or hub id of a chat model")
    own.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="JSON lines with a field `question`; those behind the measured ones make "
        "ADED's corpus",
    )
    own.add_argument(
        "--max-tokens", type=int, default=96, help="of an answer (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="all numbers go to this file as well")
    args = parser.parse_args()
    if (args.model is None) != (args.questions is None):
        parser.error("--model and --questions go together")
    return args


if __name__ == "__main__":
    sys.exit(main())
