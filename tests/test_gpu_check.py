# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check`: parts that fail stop no others, and all of it runs on a CPU."""

import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tiers import fast
from torch.profiler import ProfilerActivity, profile

# No part of the package: found beside it, for this import only.
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from benchmarks import gpu_check  # noqa: E402
from benchmarks.gpu import engines, launches, parts  # noqa: E402
from benchmarks.gpu.findings import has_cuda  # noqa: E402
from benchmarks.gpu_check import Job  # noqa: E402

sys.path.pop()

WRITE = "import json, sys; json.dump({}, open(sys.argv[1], 'w'))"


def job(part: str, detail: str, code: str = "", limit: float = 60, **found) -> Job:
    """A process that leaves findings, and then does what `code` says."""
    findings = {"rows": [], "numbers": {}, "skipped": None, "problem": None} | found
    code = WRITE.format(repr(findings)) + "\n" + code
    return Job(part, detail, (sys.executable, "-c", code, "RESULT"), limit)


def run(*jobs: Job, seconds: float = 600) -> list[gpu_check.Result]:
    """Results of a run; they were kept after each job."""
    kept: list[int] = []
    console = Console(file=StringIO())
    results = gpu_check.run(
        jobs, seconds, lambda so_far: kept.append(len(so_far)), console
    )
    assert kept == list(range(1, len(jobs) + 1))
    return results


def test_a_part_that_fails_stops_no_other():
    error = "raise RuntimeError('CUDA error: out of memory')"
    hang = "import threading; threading.Event().wait()"
    rows = [["starts", "graph mode FULL"]]
    results = run(
        job("steps", "eager", error, rows=rows),
        job("steps", "whole", hang, limit=3, rows=rows),
        job("kernels", "", problem="test_draws: wrong"),
        Job("parity", "", (sys.executable, "-c", "print('no file')", "RESULT"), 60),
        job("bandwidth", "", rows=[["copy", "1 GB/s"]]),
    )
    assert [(one.status, one.reason) for one in results] == [
        ("failed", "RuntimeError: CUDA error: out of memory"),
        ("failed", "not done after 3 s"),
        ("failed", "test_draws: wrong"),
        ("failed", "it left no findings"),
        ("ok", ""),
    ]
    # What was found before the error is kept, and what was printed.
    assert results[0].rows == results[1].rows == rows
    assert "Traceback" in results[0].log
    shown = Console(file=StringIO(), width=100)
    shown.print(gpu_check.table(results))
    text = shown.file.getvalue()
    assert "graph mode FULL" in text and "out of memory" in text and "1 GB/s" in text


def test_what_a_part_started_ends_with_it(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    child = (
        f"file = open({str(pipe)!r}, 'w'); print('open', flush=True)\n"
        "import threading; threading.Event().wait()"
    )
    code = (
        "import subprocess\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=-1)\n"
        "assert child.stdout.readline()\n"
        "raise RuntimeError('gone before its child')"
    )
    (result,) = run(job("steps", "eager", code))
    assert result.reason == "RuntimeError: gone before its child"
    os.set_blocking(reader, True)
    assert os.read(reader, 1) == b""  # waits until nobody has the other end
    os.close(reader)


def test_what_is_skipped_and_why():
    no_graphs = {"skipped": "a CPU has no CUDA graphs"}
    results = run(
        job("steps", "whole", **no_graphs),
        job("speed", "8B, whole"),
        job("speed", "8B, ar"),
    )
    assert [(one.status, one.reason) for one in results] == [
        ("skipped", "a CPU has no CUDA graphs"),
        ("skipped", "a CPU has no CUDA graphs"),
        ("ok", ""),
    ]
    (late,) = run(job("bandwidth", ""), seconds=6)
    assert (late.status, late.reason) == ("skipped", "the 0.1 minutes were up")


def test_tokens_are_compared_with_the_eager_engines():
    eager = {"numbers": {"tokens": [[1, 2], [3, 4]]}}
    results = run(
        job("steps", "eager", **eager),
        job("steps", "whole", numbers={"tokens": [[1, 2], [3, 5]]}),
    )
    assert results[1].rows == [["tokens as the eager engine's", "1 of 2 requests"]]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("cuda", [False, True])
def test_every_part_has_jobs(cuda: bool, quick: bool):
    jobs = gpu_check.jobs(gpu_check.PARTS, quick, cuda)
    assert {one.part for one in jobs} == set(gpu_check.PARTS)
    parser_sees = [one.command[one.command.index("RESULT") + 1] for one in jobs]
    assert set(parser_sees) <= set(parts.PARTS)
    for one in jobs:
        assert ("--quick" in one.command) == quick
        if one.part == "speed":
            shape, variant = one.command[-2:]
            assert ("tiny" in shape) != cuda and shape in engines.SHAPES
            assert variant == "ar" or variant in engines.VARIANTS


class Model(torch.nn.Module):
    """Two operations in the network, one in lm_head."""

    def __init__(self) -> None:
        super().__init__()
        self.logits_processor = torch.nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.neg().exp()


def test_launches_are_told_apart_by_where_they_are():
    model = Model()
    x = torch.ones(4)
    with (
        launches.named_ranges(SimpleNamespace(model=model)),
        profile(activities=[ProfilerActivity.CPU]) as profiler,
    ):
        hidden = model(x)
        hidden.sin().cos().tan()
        model.logits_processor(hidden)
    counted = launches._by_range(profiler.events())
    if not has_cuda():  # there only launches on the GPU count
        assert counted == {"network": 2, "lm_head": 1, "outside": 3}
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize("part", fast("parity", of=("kernels", "parity")))
def test_its_tests_exist(part: str):
    """Those that it names, and runs, for a CPU and for a GPU."""
    found = {
        one.command[one.command.index("--") + 1 :]
        for cuda in (False, True)
        for one in gpu_check.jobs((part,), False, cuda)
    }
    for arguments in sorted(found):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        cases = [name for name in arguments if "[" in name]
        assert set(cases) <= set(done.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(has_cuda(), reason="make gpu-check runs it here")
def test_it_runs_through_on_a_cpu(tmp_path):
    file = tmp_path / "check.json"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--quick"]
    command += [
        "--parts",
        "steps",
        "bandwidth",
        "training",
        "speed",
        "--json",
        str(file),
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(file.read_text())
    assert record["device"] == "cpu" and record["environment"]["torch"]
    parts = {(one["part"], one["detail"]): one for one in record["parts"]}
    for one in record["parts"]:
        has_graphs = one["detail"].split(", ")[-1] in ("whole", "piecewise", "async")
        assert one["status"] == ("skipped" if has_graphs else "ok"), one
        if has_graphs:
            assert one["reason"] == "a CPU has no CUDA graphs"
    training = parts["training", ""]["numbers"]
    losses = [training[way]["loss"] for way in ("padded", "packed, SDPA with a mask")]
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[0]
    assert training["told_bytes"] > 1e6
    steps = parts["steps", "eager"]["numbers"]
    # 64 tokens, two a step.
    assert steps["modes_1"] == {"NONE": 32}
    assert steps["launches_network"] > 0 and steps["launches_outside"] > 0
    for shape in ("tiny-llada", "tiny-sdar"):
        for variant in ("eager", "ar"):
            found = parts["speed", f"{shape}, {variant}"]["numbers"]["at_once_1"]
            assert found["tokens"] == 64 * found["requests"]
            assert found["forwards_per_request"] == (16 if variant == "eager" else 64)
    assert "tokens/s" in done.stdout
