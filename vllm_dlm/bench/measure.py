# SPDX-License-Identifier: Apache-2.0
"""One cell: warm up, run, and reduce what happened to the numbers that are reported.

CPU seconds are those of this process and all below it, user and system: on a shared
machine they say more than wall seconds. A server that an adapter talks to is not below
this process, and its seconds are not in them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import psutil

from vllm_dlm.bench.engine import (
    UNKNOWN_TOKEN,
    Answer,
    Costing,
    Counting,
    Counts,
    Engine,
    Work,
)
from vllm_dlm.bench.workloads import Workload

WARM_UP_BLOCKS = 2


@dataclass(frozen=True)
class Limit:
    """The arithmetic that the machine can do in one dtype."""

    gflops: float
    """GFLOP/s of all `threads`; see `environment.peak_gflops`."""
    threads: int
    is_cpu: bool
    """Then it is per CPU second of a thread, and so is what is compared with it."""


def measure(
    engine: Engine,
    workload: Workload,
    work: Work,
    *,
    limit: Limit,
    on_answer: Callable[[], Any],
) -> dict[str, Any]:
    """Run a cell; its numbers by the names in the JSON file.

    Args:
        limit: the arithmetic that the machine can do.

    Raises:
        Unsupported: the engine cannot work like that.
    """
    few = min((work.block_length or 32) * WARM_UP_BLOCKS, work.max_tokens)
    steps = work.steps and max(work.steps * few // work.max_tokens, 1)
    warm_up = replace(work, max_tokens=few, steps=steps)
    engine.generate(workload.prompts[: work.concurrency], warm_up, lambda: None)

    _forget_peak_memory()
    if isinstance(engine, Counting):
        engine.start_counting()
    cpu, started = _cpu_seconds(), time.perf_counter()
    answers = engine.generate(workload.prompts, work, on_answer)
    seconds, cpu = time.perf_counter() - started, _cpu_seconds() - cpu
    counts = engine.counts() if isinstance(engine, Counting) else None

    numbers = summarise(answers, seconds, cpu)
    numbers["peak_memory_gib"] = _peak_memory()
    numbers |= _work_done(counts, workload, numbers, limit)
    are_known = all(UNKNOWN_TOKEN not in answer.tokens for answer in answers)
    if workload.check is not None and are_known:
        right = [workload.check(i, a.tokens) for i, a in enumerate(answers)]
        numbers["accuracy"] = mean(right)
    return numbers


def measure_costs(engine: Costing, workload: Workload, work: Work) -> dict[str, Any]:
    """What steps cost beside time, in a run of their own; see `step_costs`.

    One round of requests is answered: `work.concurrency` of them, all at a time.
    """
    engine.start_costing()
    engine.generate(workload.prompts[: work.concurrency], work, lambda: None)
    costs = engine.costs()
    return {
        "cost_steps": costs.steps,
        "launches_per_step": costs.launches / costs.steps,
        "sampling_mib": costs.sampling_bytes / 2**20,
        "state_mib": costs.state_bytes / 2**20,
    }


def summarise(answers: Sequence[Answer], seconds: float, cpu: float) -> dict[str, Any]:
    """Rates and latencies of a cell's answers.

    Args:
        seconds: wall seconds for all of them.
        cpu: CPU seconds for all of them.
    """
    tokens = sum(len(answer.tokens) for answer in answers)
    forwards = [answer.forwards for answer in answers if answer.forwards is not None]
    is_known = len(forwards) == len(answers)
    per_token = [a.per_token for a in answers if a.per_token is not None]
    return {
        "requests": len(answers),
        "tokens": tokens,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "tokens_per_second": tokens / seconds,
        "seconds_per_request": seconds / len(answers),
        "cpu_seconds_per_request": cpu / len(answers),
        "forwards_per_request": mean(forwards) if is_known else None,
        "tokens_per_forward": tokens / sum(forwards) if is_known else None,
        "first_token_p50": percentile([a.first for a in answers], 50),
        "first_token_p99": percentile([a.first for a in answers], 99),
        "per_token_p50": percentile(per_token, 50),
        "per_token_p99": percentile(per_token, 99),
    }


def percentile(values: Sequence[float], percent: float) -> float | None:
    """A percentile by linear interpolation; None of no values."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _work_done(
    counts: Counts | None, workload: Workload, numbers: dict[str, Any], limit: Limit
) -> dict[str, Any]:
    """Arithmetic and overheads, from what the engine counted."""
    if counts is None:
        return {}
    work: dict[str, Any] = {"counts": asdict(counts)}
    if workload.shape is not None and counts.pairs is not None:
        gflop = workload.shape.flops(counts.rows, counts.pairs, counts.head_rows) / 1e9
        busy = numbers["seconds"]
        if limit.is_cpu:
            busy = numbers["cpu_seconds"] / limit.threads
        work |= {
            "gflop_per_request": gflop / numbers["requests"],
            # The kernel counts CPU time in hundredths of a second.
            "gflops": gflop / busy if busy else None,
            "peak_gflops": limit.gflops,
        }
    return work | _overheads(counts)


def _overheads(counts: Counts) -> dict[str, float]:
    """What of the steps is neither forward nor lm_head, relative to the forwards.

    `sampling` is the sampler's share of it, `host` the rest: scheduling, preparing
    inputs, replying. By the wall clock, and by the CPU seconds of the worker's process.
    """
    numbers = {}
    for kind in ("seconds", "cpu"):
        forward, head, sampler, step = (
            getattr(counts, f"{part}_{kind}")
            for part in ("forward", "head", "sampler", "step")
        )
        if forward:
            numbers[f"sampling_{kind}"] = sampler / forward
            numbers[f"host_{kind}"] = (step - forward - head - sampler) / forward
    return numbers


def _cpu_seconds() -> float:
    """User and system seconds of this process and all below it, so far."""
    total = time.process_time()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _processes() -> list[int]:
    """This process and all below it."""
    me = psutil.Process()
    return [me.pid, *(process.pid for process in me.children(recursive=True))]


def _forget_peak_memory() -> None:
    """Let Linux measure the peak resident memory of each process anew."""
    for pid in _processes():
        with suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


def _peak_memory() -> float | None:
    """GiB, the sum over processes of each one's peak; None where that is unknown."""
    total = 0
    for pid in _processes():
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        except OSError:
            return None
        peak = [line.split()[1] for line in status.splitlines() if "VmHWM" in line]
        total += int(peak[0]) if peak else 0
    return total / 2**20
