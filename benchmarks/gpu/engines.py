# SPDX-License-Identifier: Apache-2.0
"""Engines of the check: how they are started, how they step, how fast they are."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.findings import Findings, Skipped, has_cuda
from benchmarks.gpu.launches import counted_modes, launches

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

SHAPES: dict[str, tuple[str, dict[str, int]]] = {
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
    if variant == "async" and family == "llada":
        raise Skipped("with the cache dual no step is scheduled ahead")
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
                    max_tokens=2 * BLOCK,
                    concurrency=at_once,
                    ignore_eos=True,
                    strategy="static",
                    cache="dual",
                    block_length=BLOCK,
                    steps=BLOCK,
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
            # One token a step: a block is long enough.
            sampling = engine.sampling_params(replace(work, steps=None))
            found = launches(engine.engine, runner, prompts[0], sampling)
            for what, value, numbers in found:
                findings.add(what, value, **numbers)


def _prompts(number: int, vocabulary: int) -> list[list[int]]:
    """Token ids, none of them special."""
    return [
        [(7 * i + k) % (vocabulary - 2) for i in range(PROMPT)] for k in range(number)
    ]


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
    options: dict[str, Any]
    kind: type[VllmEngine]
    if is_ours:
        kind = VllmEngine
        options = asked_of_vllm(variant, family)
        config = diffusion_config(model, BLOCK)
    else:
        kind = AutoregressiveEngine
        options = {} if has_cuda() else {"enforce_eager": True}
        config = autoregressive_config(model.shape)
    options = options | {"load_format": "dummy"}
    new = 2 * BLOCK if quick else 8 * BLOCK
    concurrency = (1,) if quick else (1, 4, 16)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vllm-dlm-check-") as folder:
        write_json(Path(folder) / "config.json", config)
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
                    is_full = family == "llada"
                    work = replace(
                        work,
                        strategy="static",
                        cache="dual" if is_full else "none",
                        block_length=BLOCK if is_full else None,
                        steps=new // 4,
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
