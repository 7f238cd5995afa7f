# SPDX-License-Identifier: Apache-2.0
"""Counts rows and times forwards inside vLLM's worker, for any model and vLLM runner.

`StepClock` becomes a base class of the worker (`worker_extension_cls`) and is spoken to
by `collective_rpc`. It hooks the model and its logits processor, through which every
row of lm_head goes. Steps are timed from the first forward's start to the last step's
end, so that scheduling, sampling and waiting for the next batch all count. Overhead is
what of that is neither forward nor lm_head; the part of it that the sampler takes is
counted apart, because most of that is arithmetic over the vocabulary. On an accelerator
each reading waits for the device: a run with it is slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from vllm_dlm.bench.engine import Counts

EXTENSION = f"{__name__}.StepClock"


class _Stopwatch:
    """Wall and CPU seconds spent in one kind of work."""

    def __init__(self, now: Callable[[], tuple[float, float]]) -> None:
        self.now = now
        self.wall = self.cpu = 0.0
        self.since = (0.0, 0.0)

    def start(self) -> None:
        self.since = self.now()

    def stop(self) -> None:
        wall, cpu = self.now()
        self.wall += wall - self.since[0]
        self.cpu += cpu - self.since[1]


class StepClock:
    """Methods that the benchmark adds to a vLLM worker."""

    model_runner: Any

    def dlm_clock_start(self) -> None:
        """Hook the model, the first time, and count from 0."""
        if not hasattr(self, "_dlm_clock"):
            self._dlm_clock = _Clock(self.model_runner)
        self._dlm_clock.reset()

    def dlm_clock_read(self) -> dict[str, Any]:
        """What `Counts` holds, since the last start."""
        return asdict(self._dlm_clock.read())


class _Clock:
    def __init__(self, runner: Any) -> None:
        model = runner.model
        self.is_async = runner.device.type != "cpu"
        model.register_forward_pre_hook(self._before_forward)
        model.register_forward_hook(self._after_forward)
        processor = getattr(model, "logits_processor", None)
        if processor is None:
            raise ValueError(
                f"{type(model).__name__} has no logits_processor to count lm_head's "
                "rows at: pass --no-step-times"
            )
        processor.register_forward_pre_hook(self._before_head)
        processor.register_forward_hook(self._after_head)
        runner.sample_tokens = self._timed_sampler(runner.sample_tokens)
        self.reset()

    def reset(self) -> None:
        self.steps = self.forwards = self.rows = self.head_rows = self.pairs = 0
        self.forward = _Stopwatch(self._now)
        self.head = _Stopwatch(self._now)
        self.sampler = _Stopwatch(self._now)
        self.first: tuple[float, float] | None = None
        self.last = (0.0, 0.0)

    def read(self) -> Counts:
        if self.forwards != self.steps:
            raise ValueError(
                f"{self.steps - self.forwards} of {self.steps} steps did not call the "
                "model, but replayed a CUDA graph, which cannot be timed from here: "
                "pass --no-step-times, or --engine-option enforce_eager=true"
            )
        first = self.first or self.last
        return Counts(
            forwards=self.forwards,
            rows=self.rows,
            head_rows=self.head_rows,
            pairs=self.pairs,
            forward_seconds=self.forward.wall,
            head_seconds=self.head.wall,
            sampler_seconds=self.sampler.wall,
            step_seconds=self.last[0] - first[0],
            forward_cpu=self.forward.cpu,
            head_cpu=self.head.cpu,
            sampler_cpu=self.sampler.cpu,
            step_cpu=self.last[1] - first[1],
        )

    def _now(self) -> tuple[float, float]:
        if self.is_async:
            torch.accelerator.synchronize()
        return time.perf_counter(), time.process_time()

    def _before_forward(self, model: Any, inputs: Any) -> None:
        self.forward.start()
        if self.first is None:
            self.first = self.forward.since

    def _after_forward(self, model: Any, inputs: Any, output: Any) -> None:
        self.forward.stop()
        rows, pairs = _rows_and_pairs()
        self.forwards += 1
        self.rows += rows
        self.pairs += pairs

    def _before_head(self, processor: Any, inputs: Any) -> None:
        self.head.start()

    def _after_head(self, processor: Any, inputs: Any, logits: Any) -> None:
        self.head.stop()
        _, hidden_states = inputs
        self.head_rows += hidden_states.shape[0]

    def _timed_sampler(self, sample_tokens: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.sampler.start()
            head = self.head.wall, self.head.cpu
            output = sample_tokens(*args, **kwargs)
            self.sampler.stop()
            self.steps += 1
            self.sampler.wall -= self.head.wall - head[0]
            self.sampler.cpu -= self.head.cpu - head[1]
            self.last = self._now()
            return output

        return timed


def _rows_and_pairs() -> tuple[int, int]:
    """Rows of the current forward, and keys that they attend to, in one layer."""
    from vllm.forward_context import get_forward_context

    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, list):  # one per micro-batch
        metadata = metadata[0]
    if not metadata:
        return 0, 0
    layer = next(iter(metadata.values()))
    starts, keys = layer.query_start_loc.tolist(), layer.seq_lens.tolist()
    lengths = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    pairs = sum(n * k for n, k in zip(lengths, keys, strict=False))
    if getattr(layer, "causal", True):
        # Row i of n sees the keys up to its own: n (n - 1) / 2 fewer than all.
        pairs -= sum(n * (n - 1) // 2 for n in lengths)
    return starts[-1], pairs
