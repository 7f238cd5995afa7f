# SPDX-License-Identifier: Apache-2.0
"""A server under mixed load for minutes: what goes wrong, and what stays behind.

    python -m benchmarks.soak --minutes 30

A `vllm serve` of a built-in model gets requests of all kinds (`soak_load.py`) from more
clients than it runs at a time, with too few KV pages for those that run. Some clients
stream, some read slowly, some leave, some send what is wrong. Each answer is compared
with what the same request was answered alone, before; in the end all requests are asked
alone once more. Then no request and no KV page may be left, all seats must be free, and
the memory of the server's processes may not have grown, in runs of ten minutes and
more. The exit status is 1 if anything of this is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil

from benchmarks.soak_load import COMPLETIONS, MODELS, Job, Visitor, ask, make_jobs
from vllm_dlm.cli.server_process import VLLM, server_at, serving

SEATS = 8
CLIENTS = 20
NUM_JOBS = 84
SIZES = (
    *("--dtype", "float32", "--enforce-eager", "--no-dlm-online-learning"),
    *("--max-num-seqs", str(SEATS), "--max-num-batched-tokens", "2048"),
    # A text takes more pages with each canvas, and there are too few for all.
    *("--max-model-len", "512", "--dlm-max-canvas", "64"),
    *("--block-size", "32", "--num-gpu-blocks-override", "26"),
)
"""Float32: texts are compared."""

STEADY = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}
"""The server's environment. oneDNN, which multiplies matrices on a CPU, keeps what it
has compiled for the last 1,024 shapes; a worker grows by hundreds of MiB until it has
met that many, and a leak would not be seen."""
SETTLED = 10.0
"""Minutes from which on memory is judged."""
LONGEST_ANSWER = 600.0
"""Seconds; a limit against hanging, on shared cores."""
SAMPLE_EVERY = 2.0
MIB = 1 << 20
COUNTED = {
    "preemptions": "vllm:num_preemptions_total",
    "forwards": "vllm:diffusion_num_denoising_steps_total",
    "rows": "dlm:rows_total",
    "broken": "dlm:broken_requests_total",
    "unmatched": "dlm:unmatched_requests_total",
}


@dataclass
class Sample:
    """What a process holds at one moment."""

    seconds: float
    resident: float
    """MiB."""
    files: int
    threads: int


@dataclass
class Memory:
    """What the server's processes hold while it runs."""

    processes: dict[str, psutil.Process]
    begun: float = field(default_factory=time.monotonic)
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def sample(self) -> None:
        """Note what every process holds now."""
        seconds = time.monotonic() - self.begun
        for name, process in self.processes.items():
            with process.oneshot():
                held = process.memory_info().rss / MIB
                now = Sample(seconds, held, process.num_fds(), process.num_threads())
            self.samples.setdefault(name, []).append(now)

    async def watch(self) -> None:
        """Sample until cancelled."""
        while True:
            self.sample()
            await asyncio.sleep(SAMPLE_EVERY)

    def told(self, name: str) -> dict[str, Any]:
        """A process's memory in MiB: at first, after a third, in the end, its growth
        behind that third, and how many files are open and threads run more than then;
        and tenth by tenth, which tells a heap that settles from a leak.

        Each is a mean over a tenth of the time: allocators take and give back.
        """
        taken = self.samples[name]
        tenth = max(len(taken) // 10, 1)
        third = taken[len(taken) // 3 :][:tenth]
        last = taken[-tenth:]
        settled = mean(one.resident for one in third)
        end = mean(one.resident for one in last)
        return {
            "begin": round(taken[0].resident, 1),
            "settled": round(settled, 1),
            "end": round(end, 1),
            "growth": round(end - settled, 1),
            "tenths": [
                round(mean(one.resident for one in part), 1)
                for n in range(10)
                if (part := taken[len(taken) * n // 10 : len(taken) * (n + 1) // 10])
            ],
            "files": last[-1].files - third[0].files,
            "threads": last[-1].threads - third[0].threads,
        }


def processes_of_server(url: str) -> dict[str, psutil.Process]:
    """The server that this process has started at `url`, its engine, and its worker if
    the model is not in the process of the engine; by name."""
    found = {"server": server_at(url)}
    for inner in found["server"].children(recursive=True):
        title = " ".join(inner.cmdline())
        for name, part in (("engine", "EngineCore"), ("worker", "Worker")):
            if part in title:
                found[name] = inner
    if "engine" not in found:
        raise RuntimeError(f"no engine among the processes of the server: {found}")
    return found


def metrics(url: str, *names: str) -> list[float]:
    """Values of a server's metrics, summed over their labels."""
    lines = httpx.get(f"{url}/metrics", timeout=LONGEST_ANSWER).text.splitlines()
    values = []
    for name in names:
        mine = [line for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        values.append(sum(float(line.rpartition(" ")[2]) for line in mine))
    return values


def load(url: str) -> list[float]:
    """Requests that run, requests that wait, share of KV pages in use."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return metrics(url, *(f"vllm:{name}" for name in names))


async def _until(condition: Any, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.2)
    return True


async def _alone(client: httpx.AsyncClient, jobs: Sequence[Job]) -> list[list[str]]:
    return [await ask(client, job) for job in jobs]


async def _free_seats(client: httpx.AsyncClient, url: str, model: str) -> int:
    """How many requests the server still runs at a time."""
    body = {
        "model": model,
        "prompt": "Ada",
        "max_tokens": 60,
        "temperature": 0,
        "ignore_eos": True,
        "vllm_xargs": {"dlm_strategy": "static"},
    }
    most = 0

    def all_run() -> bool:
        nonlocal most
        most = max(most, int(load(url)[0]))
        return most >= SEATS

    for _ in range(5):  # they end by themselves; a look may come too late
        asked = [
            asyncio.create_task(client.post(COMPLETIONS, json=body))
            for _ in range(2 * SEATS)
        ]
        await _until(all_run, 5.0)
        await asyncio.gather(*asked)
        if most >= SEATS:
            break
    return most


async def soak(
    url: str, model: str, minutes: float, seed: int, memory: Memory
) -> dict[str, Any]:
    """Load a server, and say what came of it.

    Args:
        url: where it listens.
        model: one of `soak_load.MODELS`.
        memory: of its processes.
    """
    jobs = make_jobs(model, NUM_JOBS, seed)
    limits = httpx.Limits(max_connections=4 * CLIENTS)
    wrong: list[str] = []
    manners: Counter[str] = Counter()
    async with httpx.AsyncClient(
        base_url=url, timeout=LONGEST_ANSWER, limits=limits
    ) as client:
        alone = await _alone(client, jobs)
        before = metrics(url, *COUNTED.values())
        end = time.monotonic() + 60 * minutes
        watching = asyncio.create_task(memory.watch())

        async def visitor(number: int) -> None:
            one = Visitor(client, random.Random(f"{seed} {number}"), jobs, alone)
            while time.monotonic() < end:
                manner, complaint = await one.visit()
                manners[manner] += 1
                if complaint:
                    wrong.append(complaint)
                    print(f"{manner}: {complaint}", file=sys.stderr, flush=True)

        await asyncio.gather(*map(visitor, range(CLIENTS)))
        watching.cancel()
        if not await _until(lambda: load(url) == [0, 0, 0]):
            wrong.append(f"left behind (running, waiting, pages): {load(url)}")
        counts = [
            now - then
            for now, then in zip(metrics(url, *COUNTED.values()), before, strict=True)
        ]
        again = await _alone(client, jobs)
        wrong += [
            f"afterwards {job.body}: {now}, and before {then}"
            for job, now, then in zip(jobs, again, alone, strict=True)
            if now != then
        ]
        if (seats := await _free_seats(client, url, model)) < SEATS:
            wrong.append(f"only {seats} of {SEATS} seats are free")
    return {
        "model": model,
        "minutes": minutes,
        "asked": dict(sorted(manners.items())),
        "different_answers": len({json.dumps(answer) for answer in alone}),
        **dict(zip(COUNTED, map(int, counts), strict=True)),
        "memory_mib": {name: memory.told(name) for name in memory.samples},
        "wrong": wrong,
    }


def judge(report: dict[str, Any], most_growth: float) -> list[str]:
    """What is not as it should be.

    Args:
        report: of `soak`.
        most_growth: MiB that a process may hold more in the end than after a third of
            the time, if the run was long enough for that.
    """
    found = list(report["wrong"])
    if report["minutes"] >= SETTLED:
        found += [
            f"the {name} grew by {told['growth']} MiB"
            for name, told in report["memory_mib"].items()
            if told["growth"] > most_growth
        ]
    if not report["preemptions"]:
        found.append("no request lost its pages: the load was too small")
    if report["broken"] or report["unmatched"]:
        found.append(f"broken {report['broken']}, unmatched {report['unmatched']}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="llada-tiny")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--most-growth",
        type=float,
        default=16.0,
        help="MiB that a process may grow by, behind the first third (default: 16)",
    )
    parser.add_argument("--report", type=Path, help="write it there, too, as JSON")
    args = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        command = [VLLM, "serve", args.model, *SIZES]
        environment = {
            name: value
            for name, value in os.environ.items()
            if name != "VLLM_ENABLE_V1_MULTIPROCESSING"
        } | STEADY
        log = Path(folder, "log")
        with serving(command, log, environment=environment) as url:
            memory = Memory(processes_of_server(url))
            report = asyncio.run(soak(url, args.model, args.minutes, args.seed, memory))
    found = judge(report, args.most_growth)
    report["wrong"] = found
    text = json.dumps(report, indent=2)
    print(text)
    if args.report is not None:
        args.report.write_text(text + "\n", encoding="utf-8")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
