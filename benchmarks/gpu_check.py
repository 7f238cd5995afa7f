# SPDX-License-Identifier: Apache-2.0
"""What a machine with one GPU has to show, within a few minutes: `make gpu-check`.

    kernels    the tests that need a GPU
    parity     engines of tiny models against the oracle: tokens and forwards
    steps      an engine eager, with piecewise and whole CUDA graphs, and asynchronous:
               does it start, which steps replay which graph, what does a step launch
    bandwidth  the statistics kernel, beside a copy on the device
    training   a step of rows of different lengths, padded and packed, through SDPA and
               xformers: time, memory, and the memory that a dry run tells
    speed      tokens/s at the shapes of an 8B and a 1.7B model, the same four ways,
               beside an autoregressive model; weights are dummies, nothing is loaded

Each line is a process of its own with a time limit of its own: one that fails is
reported with its error, and the others go on. What the engine does not offer, and
what time did not suffice for, is listed with that reason. Nothing is downloaded.
Without a GPU everything runs on the CPU, at tiny sizes: that tries the check itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.gpu.engines import VARIANTS
from benchmarks.gpu.findings import has_cuda
from vllm_dlm.bench import environment
from vllm_dlm.cli.arguments import output_file
from vllm_dlm.files.whole_files import write_json

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("kernels", "parity", "steps", "bandwidth", "training", "speed")
MINUTES = {True: 8.0, False: 40.0}
"""For all parts, with a GPU and without: there the tests' cores are shared."""
SLOWER_ON_A_CPU = 5
SHORTEST = 10.0
"""Seconds: with less left, nothing is begun."""

_PARITY = "tests/engine/test_parity.py::test_parity"
_BLOCKS = "tests/engine/test_families.py::test_block_parity[SDAR-4B-Chat-b16-False]"

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@dataclass(frozen=True)
class Job:
    """One process."""

    part: str
    detail: str
    command: tuple[str, ...]
    """Is run with a file's name at its end, for its findings."""
    limit: float
    """Seconds."""
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """What came of a job."""

    part: str
    detail: str
    status: str
    """ok, failed, skipped."""
    reason: str = ""
    seconds: float = 0.0
    rows: list[list[str]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    log: str = ""
    """The end of what a job printed that failed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; 1 if one failed."""
    cuda = has_cuda()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help=f"{', '.join(PARTS)} (default: all)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the least of each part: a test, one request at a time, short texts",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES[cuda],
        help="for all parts together; what is not begun by then is skipped (default "
        f"with a GPU {MINUTES[True]:g}, without {MINUTES[False]:g})",
    )
    parser.add_argument(
        "--json",
        type=output_file,
        default=Path("runs/gpu-check.json"),
        metavar="FILE",
        help="all findings, written after each part (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error("--minutes must be above 0")
    record: dict[str, Any] = {
        "environment": environment.record(len(os.sched_getaffinity(0))),
        "device": "cuda" if cuda else "cpu",
        "quick": args.quick,
        "minutes": args.minutes,
    }

    def keep(results: Sequence[Result]) -> None:
        write_json(args.json, record | {"parts": [asdict(one) for one in results]})

    console = Console(highlight=False, width=110)
    if not cuda:
        console.print("No GPU: the same parts on the CPU, at tiny sizes.")
    results = run(jobs(args.parts, args.quick, cuda), args.minutes * 60, keep, console)
    console.print(table(results))
    console.print(f"all numbers: {args.json}", markup=False)
    return int(any(result.status == "failed" for result in results))


# -- what there is to do ---------------------------------------------------


def jobs(parts: Sequence[str], quick: bool, cuda: bool) -> list[Job]:
    """The processes, what matters most first.

    The order decides what is skipped if time is short.
    """

    def job(
        part: str, detail: str, limit: float, *command: str, **variables: str
    ) -> Job:
        options = ("--quick",) if quick else ()
        program = (sys.executable, "-m", "benchmarks.gpu.parts")
        if not cuda:
            limit *= SLOWER_ON_A_CPU
        # `--`: what follows is pytest's, options too.
        whole = (*program, *options, "RESULT", *command)
        return Job(part, detail, whole, limit, QUIET | variables)

    found = []
    if "kernels" in parts:
        tests = ["tests/kernels/test_token_stats.py"]
        tests += [] if quick else ["tests/kernels/test_draw.py"]
        if cuda:
            tests = ["tests/kernels", "tests/training/test_packing.py", "-m", "gpu"]
        found.append(job("kernels", "", 90, "tests", "--", *tests))
    if "parity" in parts:
        tests = [f"{_PARITY}[dual-16-1]"]
        tests += [] if quick else [f"{_PARITY}[none-32-1]", f"{_PARITY}[prefix-8-1]"]
        tests += [] if quick else [_BLOCKS]
        tests += ["-m", "slow or not slow"]  # whichever tier they are in
        # The oracle is plain float32: no tf32 in attention.
        exact = {"TRITON_F32_DEFAULT": "ieee"}
        found.append(job("parity", "", 120, "tests", "--", *tests, **exact))
    if "steps" in parts:
        found += [job("steps", name, 60, "steps", name) for name in VARIANTS]
    if "bandwidth" in parts:
        found.append(job("bandwidth", "", 40, "bandwidth"))
    if "training" in parts:
        found.append(job("training", "", 60, "training"))
    if "speed" in parts:
        large, small = ("8B", "1.7B") if cuda else ("tiny-llada", "tiny-sdar")
        for name in ("whole", "ar", "eager", "piecewise", "async"):
            for shape, limit in ((large, 75), (small, 60)):
                detail = f"{shape}, {name}"
                found.append(job("speed", detail, limit, "speed", shape, name))
    return found


def run(
    todo: Sequence[Job],
    seconds: float,
    keep: Callable[[Sequence[Result]], None],
    console: Console,
) -> list[Result]:
    """Run all jobs, one after the other.

    Args:
        seconds: for all of them.
        keep: is called with the results so far, after each job.
    """
    end = time.monotonic() + seconds
    results: list[Result] = []
    for job in todo:
        left = end - time.monotonic()
        if console.is_terminal:
            console.print(f"{'...':7} {job.part} {job.detail}", end="\r")
        if reason := _known_to_lack(job, results):
            result = Result(job.part, job.detail, "skipped", reason)
        elif left < SHORTEST:
            reason = f"the {seconds / 60:g} minutes were up"
            result = Result(job.part, job.detail, "skipped", reason)
        else:
            result = run_job(job, min(job.limit, left))
        results.append(result)
        _compare_tokens(results)
        keep(results)
        name = f"{result.status:7} {job.part} {job.detail}"
        console.print(f"{name:40} {result.seconds:4.0f} s  {escape(result.reason)}")
    return results


def _known_to_lack(job: Job, results: Sequence[Result]) -> str:
    """Why the small engine of `steps` could not run like that, if it could not."""
    variant = job.detail.rpartition(", ")[2]
    for other in results:
        if (other.part, other.detail) == ("steps", variant) and job.part == "speed":
            return other.reason if other.status == "skipped" else ""
    return ""


def run_job(job: Job, limit: float) -> Result:
    """Run a process for at most `limit` seconds; it and all below it end with it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vllm-dlm-check-") as folder:
        found = Path(folder, "result.json")
        command = [str(found) if part == "RESULT" else part for part in job.command]
        with Path(folder, "log").open("w+", encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **job.variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(limit)
                problem = _last_error(log) if status else ""
            except subprocess.TimeoutExpired:
                problem = f"not done after {limit:.0f} s"
            finally:
                _end(process)
            log.seek(0)
            printed = log.read()[-4000:]
        result = Result(job.part, job.detail, "ok", seconds=time.monotonic() - began)
        if found.is_file():
            text = json.loads(found.read_text(encoding="utf-8"))
            result.rows, result.numbers = text["rows"], text["numbers"]
            problem = problem or text["problem"] or ""
            if text["skipped"] and not problem:
                result.status, result.reason = "skipped", text["skipped"]
        else:
            problem = problem or "it left no findings"
        if problem:
            result.status, result.reason, result.log = "failed", problem, printed
    return result


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a job's processes: its session has its number."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_error(log: Any) -> str:
    """The line that says what was wrong; the last one if none looks like it."""
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    errors = [line for line in lines if "Error" in line.partition(":")[0]]
    return (errors or lines or ["it printed nothing"])[-1][:500]


def _compare_tokens(results: Sequence[Result]) -> None:
    """Add to the last result how many requests got the tokens of the eager engine."""
    tokens = results[-1].numbers.pop("tokens", None)
    if tokens is None:
        return
    if results[-1].detail == "eager":
        results[-1].numbers["eager_tokens"] = tokens
        return
    for other in results:
        if wanted := other.numbers.get("eager_tokens"):
            same = sum(map(list.__eq__, tokens, wanted))
            results[-1].rows.append(
                ["tokens as the eager engine's", f"{same} of {len(wanted)} requests"]
            )
            results[-1].numbers["as_eager"] = same


def table(results: Sequence[Result]) -> Table:
    """All findings."""
    made = Table(box=None, pad_edge=False)
    for column in ("part", "", "finding", "value"):
        made.add_column(column, overflow="fold")
    for result in results:
        rows = list(result.rows)
        if result.status != "ok":
            rows.append([result.status, result.reason])
        for number, (what, value) in enumerate(rows):
            part, detail = (result.part, result.detail) if number == 0 else ("", "")
            made.add_row(*map(escape, (part, detail, what, value)))
    return made


if __name__ == "__main__":
    raise SystemExit(main())
