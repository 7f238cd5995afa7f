# SPDX-License-Identifier: Apache-2.0
"""Two models that write one text: accuracy and work over tau, beside other ways.

A small and a large model answer held-out questions together (vllm_dlm.EntropyRouter),
greedily, for several tau. Beside them stand the small model alone, the large one alone,
and the same two in lossless speculative decoding: its answers are the large model's.
Counts do not depend on the machine but for rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.tables import hardware
from vllm_dlm.bench.report import check_plotting
from vllm_dlm.tasks.problems import Problem, sample_problems

ROOT = Path(__file__).resolve().parents[1]
MAX_TOKENS = 64
TURNS = ((5, 10), (2, 2), (1, 1))
"""`window` and `min_tokens`: the paper's, and two for answers as short as these."""
TAUS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5)
DRAFTS = 4
"""Tokens that the small model drafts in speculative decoding."""
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 32,
    "block_size": 32,
    "kv_cache_memory_bytes": 256 << 20,
}


class Work:
    """What an engine in this process computed, in forwards of requests and in rows."""

    def __init__(self, llm: Any) -> None:
        self.forwards = 0
        self.rows = 0
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        schedule = scheduler.schedule

        def counted(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.forwards += len(output.num_scheduled_tokens)
            self.rows += output.total_num_scheduled_tokens
            return output

        scheduler.schedule = counted


@dataclass(frozen=True)
class Row:
    """What it took to answer all problems; counts are of all requests."""

    way: str
    window: int | None
    min_tokens: int | None
    tau: float | None
    problems: int
    right: int
    tokens: int
    large_tokens: int | None
    """Written by the large model; None where that is no question."""
    large_forwards: int
    large_rows: int
    catch_up_tokens: int
    switches: int
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.problems

    @property
    def large_share(self) -> float | None:
        """Share of the tokens that the large model wrote."""
        return None if self.large_tokens is None else self.large_tokens / self.tokens


def main() -> int:
    """Measure, print the table, and write what was asked for."""
    args = _arguments()
    # The schedulers must be here, to be asked for their work.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    problems = sample_problems(args.num_problems, 0, "heldout")
    rows = [*_pair_rows(args, problems), _speculative_row(args, problems)]
    table = _table(args, rows)
    print(table)
    for path, text in (
        (args.json, json.dumps([_facts(row) for row in rows], indent=1) + "\n"),
        (args.table, table + "\n"),
    ):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if args.plot is not None:
        _plot(args, rows, args.plot)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.switching", description=__doc__
    )
    parser.add_argument(
        "--small", default="llama-tiny-draft", help="(default: %(default)s)"
    )
    parser.add_argument("--large", default="llama-tiny", help="(default: %(default)s)")
    parser.add_argument(
        "--num-problems",
        type=int,
        default=400,
        help="held-out problems (default: %(default)s)",
    )
    parser.add_argument(
        "--taus",
        type=float,
        nargs="+",
        default=list(TAUS),
        metavar="BITS",
        help="values of tau (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--table", type=Path, help="file for the table, in markdown")
    parser.add_argument("--plot", type=Path, help="file for a picture of the table")
    args = parser.parse_args()
    if args.plot is not None:
        try:
            check_plotting()
        except ValueError as error:
            parser.error(str(error))
    return args


# -- what is measured -----------------------------------------------------


def _pair_rows(args: argparse.Namespace, problems: Sequence[Problem]) -> list[Row]:
    """The single models and all rules, on one pair of engines."""
    from vllm import SamplingParams

    from vllm_dlm import EntropyRouter
    from vllm_dlm.switching.entropy import LARGE, SMALL

    router = EntropyRouter(
        args.small,
        args.large,
        tau=0,
        small_options=ENGINE,
        large_options=ENGINE,
    )
    work = Work(router.llms[LARGE])
    plain = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    rows = []
    rules = [(*turn, tau) for turn in TURNS for tau in args.taus]
    with tqdm(total=len(rules) + 2, unit="row") as progress:
        for name, model in (("large alone", LARGE), ("small alone", SMALL)):
            llm = router.llms[model]
            answered = _answer(llm.generate, problems, plain, work)
            rows.append(_row(name, answered, problems, all_large=model == LARGE))
            progress.update()
        for window, min_tokens, tau in rules:
            rule = {"ead_window": window, "ead_min_tokens": min_tokens, "ead_tau": tau}
            params = SamplingParams(
                temperature=0, max_tokens=MAX_TOKENS, extra_args=rule
            )
            # Every row begins with empty caches.
            for llm in router.llms.values():
                llm.reset_prefix_cache()
            answered = _answer(router.generate, problems, params, work)
            rows.append(
                _row("pair", answered, problems, rule=(window, min_tokens, tau))
            )
            progress.update()
    router.shutdown()
    return rows


def _speculative_row(args: argparse.Namespace, problems: Sequence[Problem]) -> Row:
    """The same two models in vLLM's own speculative decoding."""
    from vllm import LLM, SamplingParams

    from vllm_dlm.config.aliases import resolve

    llm = LLM(
        args.large,
        speculative_config={
            "method": "draft_model",
            "model": resolve(args.small),
            "num_speculative_tokens": DRAFTS,
        },
        **ENGINE,
    )
    plain = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    answered = _answer(llm.generate, problems, plain, Work(llm))
    llm.llm_engine.engine_core.shutdown()
    return _row(f"speculative decoding, {DRAFTS} drafts", answered, problems)


@dataclass(frozen=True)
class Answered:
    """Answers, and what the large model's engine did for them."""

    outputs: list[Any]
    forwards: int
    rows: int
    seconds: float


def _answer(
    generate: Callable[..., Any], problems: Sequence[Problem], params: Any, work: Work
) -> Answered:
    forwards, rows, started = work.forwards, work.rows, time.monotonic()
    questions = [problem.question for problem in problems]
    results = generate(questions, params, use_tqdm=False)
    return Answered(
        [result.outputs[0] for result in results],
        work.forwards - forwards,
        work.rows - rows,
        time.monotonic() - started,
    )


def _row(
    way: str,
    answered: Answered,
    problems: Sequence[Problem],
    *,
    rule: tuple[int, int, float] | None = None,
    all_large: bool = False,
) -> Row:
    outputs = answered.outputs
    tokens = sum(len(output.token_ids) for output in outputs)
    large_tokens: int | None = None
    if rule is not None:
        large_tokens = sum(output.tokens_by_model["large"] for output in outputs)
    elif way.endswith("alone"):
        large_tokens = tokens if all_large else 0
    window, min_tokens, tau = rule or (None, None, None)
    return Row(
        way=way,
        window=window,
        min_tokens=min_tokens,
        tau=tau,
        problems=len(problems),
        right=sum(
            problem.check(output.text)
            for problem, output in zip(problems, outputs, strict=True)
        ),
        tokens=tokens,
        large_tokens=large_tokens,
        large_forwards=answered.forwards,
        large_rows=answered.rows,
        catch_up_tokens=sum(output.catch_up_tokens for output in outputs)
        if rule
        else 0,
        switches=sum(len(output.switches) for output in outputs) if rule else 0,
        seconds=answered.seconds,
    )


# -- what is written ------------------------------------------------------


def _facts(row: Row) -> dict[str, Any]:
    shares = {"accuracy": row.accuracy, "large_share": row.large_share}
    return asdict(row) | shares


def _table(args: argparse.Namespace, rows: Sequence[Row]) -> str:
    import vllm

    command = " ".join(["python -m benchmarks.switching", *sys.argv[1:]])
    about = (
        f"Measured by `{command}` on {hardware()}, vLLM {vllm.__version__}, float32: "
        f"{args.small} and {args.large}, {rows[0].problems} held-out problems, greedy, "
        f"at most {ENGINE['max_num_seqs']} requests at a time. Forwards, rows (tokens "
        "through the network, prompts included), switches and catch-up tokens are per "
        "answer."
    )
    columns = {
        "way": "---",
        "window, dwell": "---",
        "tau (bits)": "--:",
        "accuracy": "--:",
        "large tokens": "--:",
        "large forwards": "--:",
        "large rows": "--:",
        "switches": "--:",
        "catch-up tokens": "--:",
    }
    lines = [about, "", f"| {' | '.join(columns)} |", f"|{'|'.join(columns.values())}|"]
    for row in rows:
        share = row.large_share
        cells = [
            row.way,
            "" if row.window is None else f"{row.window}, {row.min_tokens}",
            "" if row.tau is None else f"{row.tau:g}",
            f"{row.accuracy:.1%}",
            "" if share is None else f"{share:.0%}",
            f"{row.large_forwards / row.problems:.1f}",
            f"{row.large_rows / row.problems:.1f}",
            f"{row.switches / row.problems:.2f}",
            f"{row.catch_up_tokens / row.problems:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _plot(args: argparse.Namespace, rows: Sequence[Row], path: Path) -> None:
    """Accuracy and the large model's share over tau; accuracy over its forwards."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.5), layout="constrained")
    accuracy, share, work = figure.subplots(1, 3)
    for window, min_tokens in TURNS:
        turn = (window, min_tokens)
        line = [row for row in rows if (row.window, row.min_tokens) == turn]
        taus = [row.tau for row in line]
        right = [100 * row.accuracy for row in line]
        label = f"pair, window {window}, dwell {min_tokens}"
        accuracy.plot(taus, right, "o-", label=label)
        share.plot(taus, [100 * (row.large_share or 0) for row in line], "o-")
        work.plot([row.large_forwards / row.problems for row in line], right, "o-")
    others = [row for row in rows if row.tau is None]
    for marker, row in zip("s^*", others, strict=True):
        place = (row.large_forwards / row.problems, 100 * row.accuracy)
        work.plot(*place, marker, color="black", markersize=9, label=row.way)
    for axes in (accuracy, share):
        # tau 0 has its place on it, which a logarithm has not.
        axes.set_xscale("symlog", linthresh=0.01)
        axes.set_xlabel("tau, bits")
    accuracy.set_ylabel("accuracy, %")
    share.set_ylabel("tokens of the large model, %")
    work.set(xlabel="large-model forwards per answer", ylabel="accuracy, %")
    figure.suptitle(f"{args.small} and {args.large}")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
