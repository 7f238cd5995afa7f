# SPDX-License-Identifier: Apache-2.0
"""One part of `benchmarks.gpu_check`, in the process that the check gives it.

    python -m benchmarks.gpu.parts RESULT PART [ARGUMENT ...] [--quick]

A part keeps its findings in the JSON file RESULT as it comes to them, so that what was
found before an error, or before time was up, is not lost. Without CUDA each part does
on the CPU what can be done there, at sizes that a CPU can bear, or says why it does
nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.engines import run_speed, run_steps
from benchmarks.gpu.findings import Findings, Skipped, has_cuda
from benchmarks.gpu.training import run_training

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one part; an error of it is an error of this process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.parts")
    parser.add_argument("result", type=Path)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    findings = Findings(args.result)
    try:
        PARTS[args.part](findings, *args.arguments, quick=args.quick)
    except Skipped as reason:
        findings.skipped = str(reason)
    findings.write()
    return 0


# -- tests ----------------------------------------------------------------


class _Outcomes:
    """A plugin of pytest that counts."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest for each phase of each test."""
        if report.when == "call" or report.outcome != "passed":
            self.count[report.outcome] += 1
        if report.outcome == "failed":
            self._fail(report)

    def pytest_collectreport(self, report: Any) -> None:
        """Called by pytest for each file that it looks for tests in."""
        if report.outcome == "failed":
            self._fail(report)

    def _fail(self, report: Any) -> None:
        crash = getattr(report.longrepr, "reprcrash", None)
        # A file that cannot be imported has its error in the last line.
        lines = str(report.longrepr).strip().splitlines() or ["it says nothing"]
        reason = lines[-1] if crash is None else crash.message
        self.failures.append(f"{report.nodeid}: {reason[:300]}")


def run_tests(findings: Findings, *arguments: str, quick: bool) -> None:
    """Run pytest; `arguments` are its own."""
    import pytest

    os.chdir(ROOT)
    outcomes = _Outcomes()
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    pytest.main([*options, *arguments], plugins=[outcomes])
    counted = dict(outcomes.count)
    said = ", ".join(f"{number} {what}" for what, number in counted.items())
    findings.add("tests", said or "none ran", **counted, failures=outcomes.failures)
    if outcomes.failures:
        findings.problem = outcomes.failures[0]
    elif not counted.get("passed"):
        findings.problem = "no test passed"


# -- bandwidth ------------------------------------------------------------


def run_bandwidth(findings: Findings, *, quick: bool) -> None:
    """Bytes that the statistics kernel reads a second, beside a copy of the rows."""
    import torch

    from vllm_dlm.kernels.token_stats import token_stats

    device = "cuda" if has_cuda() else "cpu"
    shapes = [(512, 126_464), (2048, 126_464)] if has_cuda() else [(32, 32_000)]
    for rows, vocabulary in shapes[-1:] if quick else shapes:
        logits = torch.randn(rows, vocabulary, device=device).to(torch.bfloat16)
        target = torch.empty_like(logits)
        size = logits.numel() * logits.element_size()

        def copy(logits=logits, target=target) -> None:
            target.copy_(logits)

        def statistics_of(logits=logits) -> None:
            token_stats(logits, True, True, ban_id=0)

        calls, rounds = (3, 3) if quick or not has_cuda() else (20, 7)
        kernel, copying = (
            _seconds(function, calls, rounds) for function in (statistics_of, copy)
        )
        read, moved = size / kernel / 1e9, 2 * size / copying / 1e9
        name = f"{rows} x {vocabulary:,} bfloat16"
        findings.add(
            f"statistics, {name}",
            f"{kernel * 1e3:.3f} ms, {read:,.1f} GB/s read, {read / moved:.0%} of the "
            f"{moved:,.1f} GB/s that a copy moves",
            **{f"{rows}x{vocabulary}": {"gb_per_s": read, "copy_gb_per_s": moved}},
        )


def _seconds(function: Callable[[], object], calls: int, rounds: int) -> float:
    """Of one call among several in a row: the median of the rounds."""
    import torch

    for _ in range(3):
        function()
    measured = []
    for _ in range(rounds):
        if has_cuda():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls):
                function()
            end.record()
            end.synchronize()
            measured.append(begin.elapsed_time(end) / 1e3 / calls)
            continue
        began = time.perf_counter()
        for _ in range(calls):
            function()
        measured.append((time.perf_counter() - began) / calls)
    return statistics.median(measured)


PARTS: dict[str, Callable[..., None]] = {
    "tests": run_tests,
    "steps": run_steps,
    "bandwidth": run_bandwidth,
    "speed": run_speed,
    "training": run_training,
}

if __name__ == "__main__":
    raise SystemExit(main())
