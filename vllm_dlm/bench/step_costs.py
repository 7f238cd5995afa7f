# SPDX-License-Identifier: Apache-2.0
"""What vLLM's worker holds for its requests, and what its steps launch and allocate.

For any engine of vLLM's runner, so that two can be compared:

- **state**: bytes of all tensors that the model state and the sampler hold, found by
  walking through their attributes. Weights, the KV cache and the tables that vLLM's
  runner keeps for every model are no part of it;
- **sampling**: the most bytes that are allocated at a time from a step's hidden states
  to its tokens, lm_head included, as PyTorch's allocator counts them;
- **launches**: what a step launches from preparing the network's inputs and attention
  to its tokens, the network left out (`launch_counter.py`).

Nothing here is timed, and a step is much slower while it is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from vllm_dlm.bench.clock import StepClock
from vllm_dlm.bench.engine import Costs
from vllm_dlm.bench.launch_counter import LaunchCounter, Seam

EXTENSION = f"{__name__}.CostedWorker"


class CostedWorker(StepClock):
    """Methods that the benchmark adds to a vLLM worker."""

    def dlm_costs_start(self) -> None:
        """Count steps from now on."""
        self._dlm_costs = StepCosts(self.model_runner)
        self._dlm_costs.start()

    def dlm_costs_read(self) -> dict[str, Any]:
        """What `Costs` holds, since the start; counting ends."""
        return asdict(self._dlm_costs.end())


class StepCosts:
    """Counts the steps of a runner between `start` and `end`.

    Args:
        runner: vLLM's `GPUModelRunner` (V2), of any model.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._stack = ExitStack()
        self._steps = self._launches = self._bytes = 0

    def start(self) -> None:
        """Hook the runner."""
        runner, state = self._runner, self._runner.model_state
        seams: list[Seam] = [
            (state, "preprocess_state", "plan"),
            (state, "prepare_inputs", "inputs"),
            (state, "prepare_attn", "attention"),
            (runner, "sample", "sampler"),
        ]
        counter = LaunchCounter()
        self._stack.enter_context(counter.counting_calls(seams))
        sample = self._noted(runner.sample, counter)
        self._stack.enter_context(patch.object(runner, "sample", sample))

    def end(self) -> Costs:
        """Let go of the runner; what its steps cost."""
        self._stack.close()
        return Costs(
            steps=self._steps,
            launches=self._launches,
            sampling_bytes=self._bytes,
            state_bytes=state_bytes(self._runner),
        )

    def _noted(
        self, sample: Callable[..., Any], counter: LaunchCounter
    ) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            with allocations(self._runner.device) as most:
                outcome = sample(*args, **kwargs)
            self._steps += 1
            self._launches += sum(part.total for part in counter.take().values())
            self._bytes = max(self._bytes, *most)
            return outcome

        return noted


@contextmanager
def allocations(device: torch.device) -> Iterator[list[int]]:
    """The most bytes that were allocated at a time meanwhile, above those before.

    They stand in the list afterwards.
    """
    most: list[int] = []
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        yield most
        most.append(torch.accelerator.max_memory_allocated(device) - before)
        return
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        yield most
    results = profile.profiler
    assert results is not None and results.kineto_results is not None
    changes = [
        (event.start_ns(), event.nbytes())
        for event in results.kineto_results.events()
        if event.name() == "[memory]"
    ]
    sizes = np.array([size for _, size in sorted(changes, key=lambda one: one[0])])
    most.append(int(sizes.cumsum().max(initial=0)))


def state_bytes(runner: Any) -> int:
    """Bytes of the tensors that a runner's model state and sampler hold."""
    weights = [*runner.model.parameters(), *runner.model.buffers()]
    found = held_tensors(
        [runner.model_state, runner.sampler], without=[runner, runner.req_states]
    )
    sizes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in found
    }
    for weight in weights:
        sizes.pop(weight.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def held_tensors(
    roots: Iterable[Any], *, without: Iterable[Any] = ()
) -> Iterator[torch.Tensor]:
    """All tensors in objects, and in what their attributes hold.

    Entered are containers, and objects of vLLM's and of this package's classes, but for
    networks.

    Args:
        without: objects that are not entered.
    """
    seen = {id(one) for one in without}
    waiting = list(roots)
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, list | tuple | set | frozenset):
            waiting += one
        elif not isinstance(one, torch.nn.Module | type):
            package = type(one).__module__.partition(".")[0]
            if package in ("vllm", "vllm_dlm"):
                waiting += _attributes(one)


def _attributes(one: Any) -> list[Any]:
    slots = [
        name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ())
    ]
    values = [getattr(one, name, None) for name in slots]
    return [*getattr(one, "__dict__", {}).values(), *values]
