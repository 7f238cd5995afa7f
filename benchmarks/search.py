# SPDX-License-Identifier: Apache-2.0
"""Every search on the built-in models: accuracy, and what it took.

A diffusion model (llada-tiny, two steps for a block of 8, so that it errs) and an
autoregressive one (llama-tiny-draft) answer held-out questions. Beside each search
stands best of n with about as many generated tokens, by the checker or, where the
search has no scorer, by its own log-probability: what the search itself gains.

Scorers know the answer here. `checked` says whether a text is right; `graded` also says
how much of an unfinished text is, in place of a process reward model: a perfect one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.strategies import hardware
from vllm_dlm.tasks.problems import Problem, sample_problems

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "disable_log_stats": True,
    "max_num_seqs": 64,
    "block_size": 32,
}
DIFFUSION, AUTOREGRESSIVE = "llada-tiny", "llama-tiny-draft"
TASKS = {
    DIFFUSION: ["shuffle", "insert_any", "insert", "spell"],
    AUTOREGRESSIVE: ["sort", "add", "insert", "spell"],
}
MAX_TOKENS = {DIFFUSION: 32, AUTOREGRESSIVE: 40}
BLOCKS = {"strategy": "static", "block_length": 8, "steps_per_block": 2}
HEX = {
    length: {"strategy": "static", "block_length": length, "steps": 16}
    for length in (1, 2, 4, 8, 16)
}
"""What HEX votes over, with 32 tokens."""
GREEDY = {"n": 1, "temperature": 0}
SEED = 7

Scorer = Callable[[Sequence[Any]], list[float]]


def checked(candidates: Sequence[Any]) -> list[float]:
    """1 for a right answer."""
    return [float(each.record["problem"].check(each.text)) for each in candidates]


def graded(candidates: Sequence[Any]) -> list[float]:
    """How much of a text is right, and 1 for a right answer only."""
    return [_grade(each.record["problem"], each.text) for each in candidates]


def _grade(problem: Problem, text: str) -> float:
    if problem.check(text):
        return 1.0
    if problem.task in ("shuffle", "insert_any"):
        names = set(problem.answer.strip("[]").split(", "))
        return 0.9 * sum(text.count(name) == 1 for name in names) / len(names)
    same = os.path.commonprefix([problem.answer, text])
    return 0.9 * len(same) / max(len(problem.answer), len(text), 1)


@dataclass(frozen=True)
class Way:
    """A row of the table."""

    name: str
    driver: str
    options: dict[str, Any] = field(default_factory=dict)
    scorer: Scorer | None = None
    dlm: dict[str, Any] = field(default_factory=lambda: BLOCKS)
    """Options of a diffusion model's requests, besides those that the driver sets."""


BOTH = [
    Way("greedy", "best_of_n", GREEDY),
    Way("best of 8", "best_of_n", {"n": 8}, checked),
    Way("best of 16", "best_of_n", {"n": 16}, checked),
    Way("best of 8 by its own log-probability", "best_of_n", {"n": 8}),
    Way("vote of 8", "vote", {"n": 8}),
]
WAYS = {
    DIFFUSION: [
        *BOTH,
        Way("vote, HEX", "vote", {"hex": True}, dlm={}),
        *(
            Way(f"HEX's blocks of {length} alone", "best_of_n", GREEDY, dlm=options)
            for length, options in HEX.items()
        ),
        Way("best_first", "best_first", {"k": 4}, graded),
        Way("particles", "particles", {"n": 8}, graded),
        Way("particles by their own probability", "particles", {"n": 8}),
    ],
    AUTOREGRESSIVE: [
        *BOTH,
        Way("mcts", "mcts", {}, checked),
        Way("mcts, graded", "mcts", {}, graded),
        Way("best_first", "best_first", {"k": 4, "step_stop": [", "]}, graded),
        Way("particles", "particles", {"n": 8, "step_stop": [", "]}, graded),
        Way(
            "particles by their own probability",
            "particles",
            {"n": 8, "step_stop": [", "]},
        ),
        Way("lookahead, AdaDec", "lookahead", {"tau": 0.5}),
        Way(
            "lookahead, TQ*",
            "lookahead",
            {"method": "transfer", "k": 3, "horizon": 20},
            checked,
        ),
    ],
}


@dataclass(frozen=True)
class Row:
    """What a way took for each prompt."""

    model: str
    name: str
    scorer: str
    accuracy: float
    generated: float
    requests: float
    scores: float
    seconds: float
    """Of all prompts together."""
    equal_n: int | None = None
    """Samples of best of n with about as many tokens."""
    equal_accuracy: float | None = None


class Measured:
    """A model, and its answers.

    Args:
        model: one of the built-in models.
        num_problems: questions that it is asked.
    """

    def __init__(self, model: str, num_problems: int) -> None:
        from vllm_dlm import LLM

        self.model = model
        options: dict[str, Any] = dict(ENGINE)
        if model == DIFFUSION:
            options["dlm_online_learning"] = False
        else:
            options["kv_cache_memory_bytes"] = 64 << 20
        self.llm = LLM(model, **options)
        self.problems = sample_problems(num_problems, SEED, "heldout", TASKS[model])
        self._best_of: dict[tuple[int, bool], Row] = {}
        # Some functions are compiled when they are first called.
        self.ask(Way("", "best_of_n", {"n": 2}))

    def ask(self, way: Way) -> Row:
        """Measure one way."""
        from vllm_dlm import search

        sampling = None
        if self.model == DIFFUSION:
            sampling = {"extra_args": {"dlm": way.dlm}}
        started = time.monotonic()
        results = search.run(
            self.llm,
            way.driver,
            [{"prompt": each.question, "problem": each} for each in self.problems],
            scorer=way.scorer,
            sampling=sampling,
            use_tqdm=False,
            **{"max_tokens": MAX_TOKENS[self.model], **way.options},
        )
        seconds = time.monotonic() - started

        def mean(what: str) -> float:
            total = sum(getattr(result.stats, what) for result in results)
            return float(total / len(results))

        return Row(
            self.model,
            way.name,
            way.scorer.__name__ if way.scorer else "",
            sum(checked([result.best for result in results])) / len(results),
            mean("generated"),
            mean("requests"),
            mean("scores"),
            seconds,
        )

    def best_of(self, n: int, is_scored: bool) -> Row:
        """Best of n by the checker, or by its own log-probability; measured once."""
        if (n, is_scored) not in self._best_of:
            options = {"n": n, "temperature": 1.0 if n > 1 else 0.0}
            way = Way("", "best_of_n", options, checked if is_scored else None)
            self._best_of[n, is_scored] = self.ask(way)
        return self._best_of[n, is_scored]

    def row(self, way: Way) -> Row:
        """A way, with best of n beside it."""
        row = self.ask(way)
        if way.driver == "best_of_n":
            return row
        is_scored = way.scorer is not None
        each = self.best_of(8, is_scored).generated / 8
        n = max(1, round(row.generated / each))
        beside = self.best_of(n, is_scored).accuracy
        return Row(**{**asdict(row), "equal_n": n, "equal_accuracy": beside})


def table_of(rows: Sequence[Row]) -> str:
    """The table, in markdown."""
    lines = [
        (
            "| search | scorer | right | tokens | requests | scores | seconds | "
            "best of n at equal tokens |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        beside = ""
        if row.equal_accuracy is not None:
            beside = f"{row.equal_accuracy:.0%} (n = {row.equal_n})"
        lines.append(
            f"| {row.name} | {row.scorer} | {row.accuracy:.0%} | {row.generated:.0f} | "
            f"{row.requests:.0f} | {row.scores:.0f} | {row.seconds:.1f} | {beside} |"
        )
    return "\n".join(lines).replace("%", " %")


def main() -> int:
    """Measure, and print a table for each model."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search", description=__doc__
    )
    parser.add_argument(
        "--num-problems",
        type=int,
        default=64,
        help="held-out problems (default: %(default)s)",
    )
    parser.add_argument(
        "--models", nargs="+", choices=list(WAYS), default=list(WAYS), help="which"
    )
    parser.add_argument("--json", type=Path, help="file for all numbers")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    rows: list[Row] = []
    for model in args.models:
        from vllm.distributed.parallel_state import destroy_model_parallel

        destroy_model_parallel()
        measured = Measured(model, args.num_problems)
        own = []
        for way in WAYS[model]:
            own.append(measured.row(way))
            print(own[-1], file=sys.stderr, flush=True)
        rows += own
        print(f"\n{model}, {args.num_problems} problems, {hardware()}\n")
        print(table_of(own), flush=True)
        del measured
        gc.collect()
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([asdict(row) for row in rows], indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
