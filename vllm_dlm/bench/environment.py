# SPDX-License-Identifier: Apache-2.0
"""What the numbers of a run depend on besides its arguments: hardware and versions.

Neither host names nor users nor paths are recorded.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PEAK_SECONDS = 1.0
"""How long the arithmetic limit is measured."""

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


def record(threads: int) -> dict[str, Any]:
    """Hardware, versions and date, as they go into the JSON file."""
    import torch

    cpu, flags = _cpu()
    gpus = [
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    ]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cpu_flags": flags,
        "cores": len(psutil.Process().cpu_affinity() or range(psutil.cpu_count() or 1)),
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("vllm_dlm", "vllm", "torch")},
        "commit": _commit(),
    }


def peak_gflops(dtype: str, threads: int) -> float:
    """GFLOP/s of a large matrix product: what arithmetic this machine can reach.

    The best of the products that fit into about a second. On an accelerator by the wall
    clock; on a CPU by the CPU seconds of `threads` busy threads, so that neighbours on
    a shared machine count as little as they can.
    """
    import torch

    is_cpu = not torch.cuda.is_available()
    device, size = ("cpu", 1536) if is_cpu else ("cuda", 8192)
    torch.set_num_threads(threads)
    kind: torch.dtype = getattr(torch, dtype)
    left = torch.randn(size, size, device=device).to(kind)
    right = torch.randn(size, size, device=device).to(kind)

    def product_seconds() -> float:
        clock = time.process_time if is_cpu else time.perf_counter
        started = clock()
        torch.mm(left, right)
        if not is_cpu:
            torch.cuda.synchronize()
        return (clock() - started) / (threads if is_cpu else 1)

    began = time.perf_counter()
    best = product_seconds()
    while time.perf_counter() - began < PEAK_SECONDS:
        best = min(best, product_seconds())
    return 2 * size**3 / best / 1e9


def _cpu() -> tuple[str, list[str]]:
    """The CPU's name, and which of its vector units matter here."""
    path = Path("/proc/cpuinfo")
    facts: dict[str, str] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name, [flag for flag in _FLAGS if flag in flags]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this package's checkout, None where it is no checkout."""
    here = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            env={**os.environ, "GIT_CEILING_DIRECTORIES": str(here.parents[2])},
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def default_threads() -> int:
    """OMP_NUM_THREADS, or the cores that this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0))
