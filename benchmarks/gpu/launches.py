# SPDX-License-Identifier: Apache-2.0
"""Which CUDA graphs the steps of an engine replay, and what a steady step launches."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.gpu.findings import has_cuda

WARM, PROFILED, TIMED = 6, 4, 16
"""Steps of a request: those before, those that are profiled, and timed without it."""

LAUNCHES = ("LaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync", "GraphLaunch")
"""Parts of the names of calls that put something into a GPU's queue."""


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


def launches(
    engine: Any, runner: Any, prompt: list[int], sampling: Any
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Launches of a steady step, in the network, in lm_head and outside of both.

    One request in the middle of a block. On a CPU: operations of torch. Yields rows of
    the table, and their numbers.

    Args:
        engine: vLLM's, in this process.
        runner: the one in its worker.
        sampling: parameters with which a block takes as many steps as are done here.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    def steps(number: int) -> None:
        for _ in range(number):
            engine.step()
        if has_cuda():
            torch.accelerator.synchronize()

    engine.add_request("steady", {"prompt_token_ids": prompt}, sampling)
    steps(WARM)
    began = time.perf_counter()
    steps(TIMED)
    seconds = (time.perf_counter() - began) / TIMED
    activities = [ProfilerActivity.CPU]
    if has_cuda():
        activities.append(ProfilerActivity.CUDA)
    with named_ranges(runner), profile(activities=activities) as profiler:
        steps(PROFILED)
    engine.abort_request(["steady"])
    while engine.has_unfinished_requests():
        engine.step()

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
