# SPDX-License-Identifier: Apache-2.0
"""Count what a denoise step asks a GPU to launch outside the network.

No GPU is needed: what is counted does not depend on the device
(`vllm_dlm/bench/launch_counter.py` says what is). llada-tiny decodes questions with
each strategy, and the largest count of a few steady steps is shown: all requests are in
the midst of decoding, none comes or goes. The row `4 strategies` is a batch that is
decided by static, threshold, entropy and slowfast together. Admissions are counted per
round: what all requests that come with one step cost together.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from vllm_dlm.bench.launch_counter import (
    ADMISSION,
    STEP_PARTS,
    LaunchCounter,
    Launches,
    TritonTwins,
)

STRATEGIES = ("static", "threshold", "entropy", "joint", "learn2pd", "slowfast")
MIXED = ("static", "threshold", "entropy", "slowfast")
BATCHES = {name: (name,) for name in STRATEGIES} | {"4 strategies": MIXED}
"""Name of a batch -> strategies of its requests, in turns."""
REQUESTS = (1, 4, 16)
MODES = ("eager", "compiled")
MAX_TOKENS, BLOCK_LENGTH = 192, 32
WARM_UP, STEADY = 1, 3
"""Steps after an admission that are not counted, and those that are."""


@dataclass(frozen=True)
class Count:
    """What one batch launches."""

    mode: str
    batch: str
    requests: int
    step: Launches
    """Of the steady step that launches most."""
    parts: dict[str, Launches]
    """The same, by part of the step."""
    admission: Launches
    """Of all its requests, which come with one step."""

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        launches = {"step": self.step, "admission": self.admission} | self.parts
        return {
            "mode": self.mode,
            "batch": self.batch,
            "requests": self.requests,
        } | {name: vars(one) for name, one in launches.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print the table, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--batches",
        nargs="+",
        choices=tuple(BATCHES),
        default=list(BATCHES),
        metavar="NAME",
        help=f"of {', '.join(BATCHES)} (default: all)",
    )
    parser.add_argument(
        "--requests",
        nargs="+",
        type=int,
        default=list(REQUESTS),
        metavar="N",
        help="requests that are decoded together (default: 1 4 16)",
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        default=list(MODES),
        metavar="MODE",
        help="eager is --enforce-eager (default: eager compiled)",
    )
    parser.add_argument(
        "--no-triton",
        action="store_true",
        help="count no Triton kernels: inductor may then find its C++ in its cache",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results there")
    args = parser.parse_args(argv)
    if min(args.requests) < 1:
        parser.error("--requests must be at least 1")
    has_triton = importlib.util.find_spec("triton") is not None and not args.no_triton
    cases = [
        (name, number)
        for name in args.batches
        for number in sorted({max(n, len(BATCHES[name])) for n in args.requests})
    ]
    counts = []
    with tqdm(total=len(args.modes) * len(cases), unit="batch") as progress:
        for mode in args.modes:
            twins = TritonTwins() if has_triton else None
            with engine(mode, max(args.requests), twins) as llm:
                for name, number in cases:
                    progress.set_description(f"{mode}: {name}")
                    counts.append(count(llm, mode, name, number, twins))
                    progress.update()
    show(counts)
    if args.json is not None:
        from vllm_dlm.bench import environment

        record = {
            "environment": environment.record(1),
            "counts": [one.record() for one in counts],
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


# -- what is counted ------------------------------------------------------


@contextmanager
def engine(mode: str, requests: int, twins: TritonTwins | None) -> Iterator[Any]:
    """llada-tiny in this process, where the parts of an engine can be counted.

    Args:
        requests: that it must serve at a time.
        twins: generates Triton code of what is compiled for it.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm.distributed.parallel_state import destroy_model_parallel

    from benchmarks.engine import start_engine

    destroy_model_parallel()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if twins is not None and mode == "compiled":
            stack.enter_context(twins.generating())
        llm = start_engine(
            folder,
            # As on the GPU whose launches are meant.
            dtype="bfloat16",
            enforce_eager=mode == "eager",
            dlm_compile="none" if mode == "eager" else "all",
            # The network is not counted: its compilation would only take time.
            compilation_config={"mode": 0},
            max_num_seqs=max(requests, len(MIXED)),
            max_model_len=256,
            kv_cache_memory_bytes=256 << 20,
            disable_log_stats=True,
            # Found again, a prompt would be another admission.
            enable_prefix_caching=False,
        )
        yield llm
        llm.llm_engine.engine_core.shutdown()


def count(
    llm: Any, mode: str, batch: str, requests: int, twins: TritonTwins | None = None
) -> Count:
    """Decode a batch, and count what its admission and its steady steps launch.

    Args:
        llm: of `engine`.
        batch: a name of `BATCHES`.
        requests: at least one for each of its strategies.

    Raises:
        RuntimeError: a request has ended before the last steady step.
    """
    strategies = BATCHES[batch]
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    runner = executor.driver_worker.worker.model_runner
    # What is made once for a strategy and its requests to come.
    _end(llm, _added(llm, strategies, len(strategies)))
    with LaunchCounter(twins).counting(runner) as counter:
        names = _added(llm, strategies, requests)
        admission = counter.take()[ADMISSION]
        for _ in range(WARM_UP):
            _step(llm)
        counter.take()
        steps = []
        for _ in range(STEADY):
            _step(llm)
            steps.append(counter.take())
    _end(llm, names)
    step = max(steps, key=lambda parts: _whole(parts).total)
    parts = {name: step.get(name, Launches()) for name in STEP_PARTS}
    return Count(mode, batch, requests, _whole(step), parts, admission)


def _whole(parts: dict[str, Launches]) -> Launches:
    """What a step launches, and what is launched beside it though none is admitted."""
    return sum(parts.values(), Launches())


def _added(llm: Any, strategies: Sequence[str], requests: int) -> list[str]:
    """Admit requests, decided by the strategies in turns, with one step; their ids."""
    from vllm import SamplingParams

    from vllm_dlm.tasks.problems import sample_problems

    names = [f"request-{i}" for i in range(requests)]
    questions = [problem.question for problem in sample_problems(requests, seed=0)]
    for i, (name, question) in enumerate(zip(names, questions, strict=True)):
        strategy = strategies[i % len(strategies)]
        dlm = {"strategy": strategy, "block_length": BLOCK_LENGTH}
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            extra_args={"dlm": dlm},
        )
        llm.llm_engine.add_request(name, question, sampling)
    _step(llm)
    return names


def _step(llm: Any) -> None:
    ended = [one.request_id for one in llm.llm_engine.step() if one.finished]
    if ended:
        raise RuntimeError(f"{', '.join(ended)}: ended before the steps were counted")


def _end(llm: Any, names: list[str]) -> None:
    """Drop requests; the worker hears of them with the next step."""
    llm.llm_engine.abort_request(names)
    llm.llm_engine.step()


# -- how it is shown ------------------------------------------------------


def show(counts: Sequence[Count]) -> None:
    """Print the table."""
    table = Table(title="Launches outside the network")
    for column in ("", "strategy"):
        table.add_column(column, no_wrap=True)
    for column in (
        *("requests", "operations", "copies", "functions", "C++ kernels"),
        *("Triton kernels", "admission"),
    ):
        table.add_column(column, justify="right")
    previous = None
    for one in counts:
        if previous not in (None, one.mode):
            table.add_section()
        triton = one.step.triton_kernels
        table.add_row(
            one.mode if one.mode != previous else "",
            one.batch,
            f"{one.requests}",
            f"{one.step.num_operations}",
            f"{one.step.copies}",
            f"{one.step.functions}",
            f"{one.step.kernels}",
            "-" if triton is None else f"{triton}",
            f"{one.admission.total}",
        )
        previous = one.mode
    Console(width=110).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
