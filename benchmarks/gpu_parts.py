# SPDX-License-Identifier: Apache-2.0
"""One part of `benchmarks.gpu_check`, in the process that the check gives it.

    python -m benchmarks.gpu_parts RESULT PART [ARGUMENT ...] [--quick]

A part keeps its findings in the JSON file RESULT as it comes to them (`Findings`), so
that what was found before an error, or before time was up, is not lost. Without CUDA
each part does on the CPU what can be done there, at sizes that a CPU can bear, or says
why it does nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 32
PROMPT = 128

VARIANTS: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "piecewise": {
        "compilation_config": {
            "cudagraph_mode": "PIECEWISE",
            # vLLM's own sizes are for requests of one row each.
            "cudagraph_capture_sizes": [BLOCK * n for n in (1, 2, 4, 8, 12, 16)],
        }
    },
    "whole": {"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}},
    "async": {
        "compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"},
        "async_scheduling": True,
    },
}
"""How an engine runs a step -> the options of vLLM's that ask for it."""

SHAPES = {
    # LLaDA-8B's.
    "8B": ("llada", dict(width=4096, layers=32, heads=32, kv_heads=32, head_dim=128,
                         mlp=12288, vocabulary=126464)),
    # SDAR-1.7B's, but with an lm_head of its own.
    "1.7B": ("sdar", dict(width=2048, layers=28, heads=16, kv_heads=8, head_dim=128,
                          mlp=6144, vocabulary=151936)),
    "tiny-llada": ("llada", dict(width=64, layers=2, heads=2, kv_heads=2, head_dim=32,
                                 mlp=128, vocabulary=256)),
    "tiny-sdar": ("sdar", dict(width=64, layers=2, heads=2, kv_heads=1, head_dim=32,
                               mlp=128, vocabulary=256)),
}  # fmt: skip
"""Name -> family, and the sizes of `vllm_dlm.bench.shapes.Shape`."""


class Skipped(Exception):
    """There is nothing to do here; the text says why."""


@dataclass
class Findings:
    """What a part has found: rows of the table, and numbers for the JSON file."""

    file: Path
    rows: list[tuple[str, str]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    skipped: str | None = None
    problem: str | None = None
    """What is wrong, where the part itself came to its end."""

    def add(self, what: str, value: str, **numbers: Any) -> None:
        """Keep a row of the table and what stands behind it."""
        self.rows.append((what, value))
        self.numbers |= numbers
        self.write()

    def write(self) -> None:
        """Write the file anew."""
        found = {name: value for name, value in vars(self).items() if name != "file"}
        self.file.write_text(json.dumps(found), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one part; an error of it is an error of this process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_parts")
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


def has_cuda() -> bool:
    """Whether there is a GPU that CUDA serves."""
    import torch

    return torch.cuda.is_available()


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
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash is not None else str(report.longrepr)
            self.failures.append(f"{report.nodeid}: {reason.strip()[:300]}")


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


# -- engines --------------------------------------------------------------


@contextmanager
def started(
    engine: Any, model: Path, options: dict[str, Any]
) -> Iterator[tuple[Any, Any]]:
    """The benchmark's engine with a model: itself, and the runner in its worker."""
    facts = {"dtype": "bfloat16", "seed": 0, "ends_texts": False} | options
    engine.start(str(model), facts)
    try:
        executor = engine.engine.engine_core.engine_core.model_executor
        yield engine, executor.driver_worker.worker.model_runner
    finally:
        engine.stop()


def asked_of_vllm(variant: str, family: str) -> dict[str, Any]:
    """A variant's options of vLLM, for our engine.

    What all requests ask for is the server's own: from that the engine decides which
    steps are captured as graphs, and what of a step is compiled.

    Raises:
        Skipped: it is one of CUDA graphs, and there are none.
    """
    if variant != "eager" and not has_cuda():
        raise Skipped("a CPU has no CUDA graphs")
    server: dict[str, Any] = {"strategy": "static"}
    if family == "llada":
        server |= {"cache": "dual", "block_length": BLOCK}
    common = {"async_scheduling": False, "additional_config": {"dlm": server}}
    return common | VARIANTS[variant]


def check_offered(variant: str, engine: Any) -> None:
    """Whether the engine does what was asked of it.

    Raises:
        Skipped: it has made something else of it.
    """
    config = engine.engine.vllm_config
    if variant == "async" and not config.scheduler_config.async_scheduling:
        raise Skipped("this engine has switched asynchronous scheduling off")
    mode = config.compilation_config.cudagraph_mode
    lacks = {
        "piecewise": not mode.has_piecewise_cudagraphs(),
        "whole": not mode.has_full_cudagraphs(),
        "async": not mode.has_full_cudagraphs(),
    }
    if lacks.get(variant):
        raise Skipped(f"this engine has made the graph mode {mode.name}")


def run_steps(findings: Findings, variant: str, *, quick: bool) -> None:
    """Start an engine of a small model: which graphs are replayed, what is launched.

    Args:
        variant: of `VARIANTS`.
    """
    from vllm_dlm.bench.checkpoints import write_random
    from vllm_dlm.bench.engine import Work
    from vllm_dlm.bench.served import VllmEngine
    from vllm_dlm.bench.shapes import RandomModel

    options = asked_of_vllm(variant, "llada")
    sizes = "d=64,layers=2,heads=2,mlp=128,vocab=256"
    if has_cuda():
        sizes = "d=256,layers=4,heads=4,mlp=768,vocab=32000"
    model = RandomModel.parse(f"random:{sizes}")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vllm-dlm-check-") as folder:
        write_random(Path(folder), model, block_length=BLOCK, seed=0)
        engine = VllmEngine(options, "offline", step_times=False)
        lengths = {"max_length": PROMPT + 4 * BLOCK, "max_concurrency": 4}
        with started(engine, Path(folder), lengths) as (engine, runner):
            seconds = time.perf_counter() - began
            check_offered(variant, engine)
            mode = engine.engine.vllm_config.compilation_config.cudagraph_mode
            findings.add(
                "starts", f"graph mode {mode.name}", mode=mode.name, start=seconds
            )
            tokens: list[list[int]] = []
            for at_once in (1, 4):
                # Two tokens a step: where a block is done, all of them are.
                work = Work(
                    *(2 * BLOCK, at_once, True, "static"),
                    **{"cache": "dual", "block_length": BLOCK, "steps": BLOCK},
                )
                prompts = _prompts(at_once, model.shape.vocabulary)
                with counted_modes(runner) as modes:
                    answers = engine.generate(prompts, work, lambda: None)
                tokens += [answer.tokens for answer in answers]
                said = ", ".join(f"{name} {n}" for name, n in modes.items())
                findings.add(
                    f"steps by graph, {at_once} at once",
                    said or "no graphs",
                    **{f"modes_{at_once}": dict(modes)},
                )
            findings.numbers["tokens"] = tokens
            for what, value, numbers in launches(engine, runner, model):
                findings.add(what, value, **numbers)


def _prompts(number: int, vocabulary: int) -> list[list[int]]:
    """Token ids, none of them special."""
    return [
        [(7 * i + k) % (vocabulary - 2) for i in range(PROMPT)] for k in range(number)
    ]


@contextmanager
def counted_modes(runner: Any) -> Iterator[Counter[str]]:
    """Forwards by the kind of CUDA graph that vLLM chose for them."""
    from vllm_dlm.vllm_objects import replace

    counter: Counter[str] = Counter()
    manager = getattr(runner, "cudagraph_manager", None)
    if manager is None:
        yield counter
        return
    dispatch = manager.dispatch

    def counting(*args: Any, **kwargs: Any) -> Any:
        chosen = dispatch(*args, **kwargs)
        counter[chosen.cg_mode.name] += 1
        return chosen

    replace(manager, "dispatch", counting)
    try:
        yield counter
    finally:
        replace(manager, "dispatch", dispatch)


# -- launches -------------------------------------------------------------

WARM, PROFILED, TIMED = 6, 4, 16
"""Steps of a request: those before, those that are profiled, and timed without it."""

LAUNCHES = ("LaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync", "GraphLaunch")
"""Parts of the names of calls that put something into a GPU's queue."""


def launches(
    engine: Any, runner: Any, model: Any
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Launches of a steady step, in the network, in lm_head and outside of both.

    One request in the middle of a block, one token a step. On a CPU: operations of
    torch. Yields rows of the table, and their numbers.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    from vllm_dlm.bench.engine import Work

    work = Work(2 * BLOCK, 1, True, "static", cache="dual", block_length=BLOCK)
    (prompt,) = _prompts(1, model.shape.vocabulary)
    core = engine.engine

    def steps(number: int) -> None:
        for _ in range(number):
            core.step()
        if has_cuda():
            torch.accelerator.synchronize()

    core.add_request("steady", {"prompt_token_ids": prompt}, engine._sampling(work))
    steps(WARM)
    began = time.perf_counter()
    steps(TIMED)
    seconds = (time.perf_counter() - began) / TIMED
    activities = [ProfilerActivity.CPU]
    if has_cuda():
        activities.append(ProfilerActivity.CUDA)
    with named_ranges(runner), profile(activities=activities) as profiler:
        steps(PROFILED)
    core.abort_request(["steady"])
    while core.has_unfinished_requests():
        core.step()

    events = profiler.events()
    where = _by_range(events)
    total = {name: number / PROFILED for name, number in where.items()}
    unit = "launches" if has_cuda() else "operations (views too)"
    for name in ("network", "lm_head", "outside"):
        number = total.get(name, 0.0)
        yield f"{unit} a step, {name}", f"{number:.0f}", {f"launches_{name}": number}
    yield "a step", f"{seconds * 1e3:.2f} ms", {"step_ms": seconds * 1e3}
    if has_cuda():
        busy = [e.time_range.elapsed_us() for e in events if _is_device_work(e)]
        busy_ms = sum(busy) / PROFILED / 1e3
        count = len(busy) / PROFILED
        yield (
            "kernels and copies on the GPU",
            f"{count:.0f} a step, {busy_ms:.2f} ms",
            {"kernels": count, "kernels_ms": busy_ms},
        )


@contextmanager
def named_ranges(runner: Any) -> Iterator[None]:
    """The profiler's names for the time inside the network and lm_head."""
    from torch.profiler import record_function

    handles = []
    for name, module in (
        ("network", runner.model),
        ("lm_head", runner.model.logits_processor),
    ):
        opened: list[Any] = []

        def enter(module: Any, inputs: Any, name: str = name, opened=opened) -> None:
            opened.append(record_function(name))
            opened[-1].__enter__()

        def leave(module: Any, inputs: Any, output: Any, opened=opened) -> None:
            opened.pop().__exit__(None, None, None)

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_range(events: Any) -> Counter[str]:
    """How many launches lie in each named range of time, and outside of all."""
    from torch.autograd import DeviceType

    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    ranges = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in on_host
        if event.name in ("network", "lm_head")
    ]
    counter: Counter[str] = Counter()
    for event in on_host:
        if not _is_launch(event):
            continue
        at = event.time_range.start
        inside = [name for name, start, end in ranges if start <= at <= end]
        # A whole graph is replayed without a call of the model.
        is_graph = "GraphLaunch" in event.name
        counter[inside[0] if inside else "network" if is_graph else "outside"] += 1
    return counter


def _is_launch(event: Any) -> bool:
    if has_cuda():
        return any(part in event.name for part in LAUNCHES)
    parent = event.cpu_parent
    return event.name.startswith("aten::") and (
        parent is None or not parent.name.startswith("aten::")
    )


def _is_device_work(event: Any) -> bool:
    from torch.autograd import DeviceType

    # The named ranges are shown on the device as well.
    named = ("network", "lm_head", "ProfilerStep")
    return event.device_type == DeviceType.CUDA and not event.name.startswith(named)


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


# -- speed ----------------------------------------------------------------


def run_speed(findings: Findings, shape: str, variant: str, *, quick: bool) -> None:
    """Tokens/s of a model of dummy weights: config.json is all there is on the disk.

    Args:
        shape: of `SHAPES`.
        variant: of `VARIANTS`, or `ar`: a Llama of this shape, as vLLM serves it.
    """
    from vllm_dlm.bench.checkpoints import autoregressive_config, diffusion_config
    from vllm_dlm.bench.engine import Work
    from vllm_dlm.bench.measure import Limit, measure
    from vllm_dlm.bench.served import AutoregressiveEngine, VllmEngine
    from vllm_dlm.bench.shapes import RandomModel, Shape
    from vllm_dlm.bench.workloads import Workload
    from vllm_dlm.files.whole_files import write_json

    family, sizes = SHAPES[shape]
    model = RandomModel(Shape(**sizes), family)
    is_ours = variant != "ar"
    if is_ours:
        options = asked_of_vllm(variant, family)
        config = diffusion_config(model, BLOCK)
    else:
        options = {} if has_cuda() else {"enforce_eager": True}
        config = autoregressive_config(model.shape)
    options = options | {"load_format": "dummy"}
    new = 2 * BLOCK if quick else 8 * BLOCK
    concurrency = (1,) if quick else (1, 4, 16)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vllm-dlm-check-") as folder:
        write_json(Path(folder) / "config.json", config)
        kind = VllmEngine if is_ours else AutoregressiveEngine
        engine = kind(options, "offline", step_times=False)
        facts = {
            "max_length": PROMPT + new,
            "max_concurrency": max(concurrency),
            "token_bytes": 2 * model.shape.numbers_per_token,
        }
        with started(engine, Path(folder), facts) as (engine, _):
            start = time.perf_counter() - began
            if is_ours:
                check_offered(variant, engine)
            for at_once in concurrency:
                work = Work(new, at_once, True)
                if is_ours:
                    # 4 tokens a step, whatever the weights are.
                    work = Work(
                        *(new, at_once, True, "static"),
                        **{"cache": "dual" if family == "llada" else "none"},
                        **{"block_length": BLOCK if family == "llada" else None},
                        **{"steps": new // 4},
                    )
                prompts = _prompts(max(2 * at_once, 4), model.shape.vocabulary)
                workload = Workload(shape, folder, model.shape, prompts, True)
                limit = Limit(0.0, 1, not has_cuda())
                found = measure(
                    engine, workload, work, limit=limit, on_answer=lambda: None
                )
                speed, first = found["tokens_per_second"], found["first_token_p50"]
                findings.add(
                    f"{at_once} at once",
                    f"{speed:,.1f} tokens/s, first after {first * 1e3:,.0f} ms",
                    **{f"at_once_{at_once}": found, "start": start},
                )


PARTS: dict[str, Callable[..., None]] = {
    "tests": run_tests,
    "steps": run_steps,
    "bandwidth": run_bandwidth,
    "speed": run_speed,
}

if __name__ == "__main__":
    raise SystemExit(main())
