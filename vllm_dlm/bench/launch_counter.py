# SPDX-License-Identifier: Apache-2.0
"""Counts what a GPU would be asked to launch outside the network, on any device.

Counted is what our parts of a step dispatch: planning, the network's inputs, attention
metadata, the sampler with lm_head and statistics, and admission. The network itself and
vLLM's own preparation are not. A launch is one of

- a tensor operation that PyTorch dispatches. Views and allocations launch nothing, and
  an operation that PyTorch is made up of others counts as those;
- a copy between the host's memory and the device's. On a CPU none is needed, and none
  dispatched: the calls that would make one are counted instead;
- a kernel of a function that `torch.compile` has compiled. These are counted apart: a
  compiled function dispatches nothing but the operations that inductor leaves to
  PyTorch. Its number of kernels is what inductor has generated for it, also where the
  code came from inductor's cache: loop nests in C++, or Triton kernels.

On a CPU the statistics of logits are one numba kernel, which nobody dispatches, and
some tensor operations behind it; on a GPU they are one Triton kernel.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.utils import fresh_cache
from torch.utils._python_dispatch import TorchDispatchMode

Seam = tuple[Any, str, str]
"""An object, the name of a function of it, and which part of a step that is."""
STEP_PARTS = ("plan", "inputs", "attention", "sampler")
ADMISSION = "admission"

_LAUNCH_NOTHING = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("detach_", "_unsafe_view"),
}
"""Operations that are no views by their schema, and still only lay out memory."""


@dataclass
class Launches:
    """What has been launched; see the module docstring."""

    operations: Counter[str] = field(default_factory=Counter)
    """Name of a tensor operation -> how often it was dispatched."""
    copies: int = 0
    """Copies between host and device that a CPU does without."""
    functions: int = 0
    """Calls of compiled functions."""
    kernels: int = 0
    """Kernels of these, on this device."""
    triton_kernels: int | None = 0
    """Triton kernels that they would be on a GPU, with what inductor leaves to PyTorch;
    None where they were not generated (`TritonTwins`)."""

    def __add__(self, other: Launches) -> Launches:
        return Launches(
            self.operations + other.operations,
            self.copies + other.copies,
            self.functions + other.functions,
            self.kernels + other.kernels,
            _sum(self.triton_kernels, other.triton_kernels),
        )

    def add_call(self, kernels: int, triton_kernels: int | None) -> None:
        """Count a call of a compiled function."""
        self.functions += 1
        self.kernels += kernels
        self.triton_kernels = _sum(self.triton_kernels, triton_kernels)

    @property
    def num_operations(self) -> int:
        """Tensor operations dispatched."""
        return self.operations.total()

    @property
    def total(self) -> int:
        """All launches on this device."""
        return self.num_operations + self.copies + self.kernels


def _sum(one: int | None, other: int | None) -> int | None:
    """Of two numbers; unknown if either is."""
    return None if one is None or other is None else one + other


class LaunchCounter(TorchDispatchMode):
    """Counts the launches of one engine's parts while it is entered by `counting`.

    Args:
        twins: says how many Triton kernels a compiled function would be.
    """

    def __init__(self, twins: TritonTwins | None = None) -> None:
        super().__init__()
        self._twins = twins
        self._now = Launches()
        self.parts: dict[str, Launches] = {}
        """Name of a part (`STEP_PARTS`, `ADMISSION`) -> what it has launched."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions run as they are: they would run eagerly otherwise."""
        return True

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with self:
            made = operation.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        made = operation(*args, **kwargs)
        name = operation.overloadpacket.__name__
        if not operation.is_view and name not in _LAUNCH_NOTHING:
            self._now.operations[name] += 1
        return made

    def take(self) -> dict[str, Launches]:
        """What each part has launched since the last call."""
        parts, self.parts = self.parts, {}
        return parts

    def step(self) -> Launches:
        """What a step has launched since the last call, admissions left out."""
        parts = self.take()
        return sum((parts.get(name, Launches()) for name in STEP_PARTS), Launches())

    @contextmanager
    def counting(self, runner: Any) -> Iterator[LaunchCounter]:
        """Count what an engine in this process launches.

        Args:
            runner: vLLM's `GPUModelRunner` with a `DlmModelState`.
        """
        state, sampler = runner.model_state, runner.sampler
        seams = [
            (state, "preprocess_state", "plan"),
            (state, "prepare_inputs", "inputs"),
            (state, "prepare_attn", "attention"),
            (type(sampler), "__call__", "sampler"),
            (state, "add_request", ADMISSION),
            (state, "apply_staged_writes", ADMISSION),
            (sampler, "add_request", ADMISSION),
            (sampler, "apply_staged_writes", ADMISSION),
        ]
        with self.counting_calls(seams):
            yield self

    @contextmanager
    def counting_calls(self, seams: Iterable[Seam]) -> Iterator[LaunchCounter]:
        """Count what some functions launch, of any engine."""
        with ExitStack() as stack:
            for owner, name, part in seams:
                counted = self._counted(getattr(owner, name), part)
                stack.enter_context(patch.object(owner, name, counted))
            yield self

    def _counted(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The function, whose launches are those of a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._now = self.parts.setdefault(part, Launches())
            with self, self._watching():
                return function(*args, **kwargs)

        return call

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Hear of copies that are none on a CPU, and of compiled functions' calls."""
        to, run = torch.Tensor.to, CompiledFxGraph.__call__

        def move(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            moved = to(tensor, *args, **kwargs)
            target = kwargs.get("device", args[0] if args else None)
            if moved is tensor and isinstance(target, torch.device | str):
                self._now.copies += 1
            return moved

        def call(graph: CompiledFxGraph, inputs: Any) -> Any:
            twin = None if self._twins is None else self._twins.kernels_of(graph)
            kernels = graph.metrics_deltas.generated_kernel_count
            self._now.add_call(kernels, twin)
            return run(graph, inputs)

        with (
            patch.object(torch.Tensor, "to", move),
            patch.object(CompiledFxGraph, "__call__", call),
        ):
            yield


class TritonTwins:
    """Generates Triton code of what inductor compiles for a CPU, and counts kernels.

    The code is never run: nothing but a Triton wheel is needed. Functions must be
    compiled while `generating` is entered.
    """

    def __init__(self) -> None:
        self._kernels: dict[int, int] = {}
        """id of a compiled graph -> launches in its Triton code."""
        self._graphs: list[object] = []
        """They stay, and so their ids."""

    def kernels_of(self, graph: CompiledFxGraph) -> int | None:
        """Triton kernels of a compiled graph; None if it was compiled elsewhere."""
        return self._kernels.get(id(graph))

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Generate a twin of everything that is compiled; nothing is found compiled."""
        compiler = compile_fx._InProcessFxCompile
        compile_one = compiler.codegen_and_compile

        def both(
            self_: Any, gm: torch.fx.GraphModule, inputs: Any, check: Any, more: Any
        ) -> Any:
            # Lowering changes the graph in place.
            twin = copy.deepcopy(gm)
            launches = _triton_launches(
                lambda: compile_one(self_, twin, inputs, check, more)
            )
            graph = compile_one(self_, gm, inputs, check, more)
            self._kernels[id(graph)] = launches
            self._graphs.append(graph)
            return graph

        with (
            patch.object(compiler, "codegen_and_compile", both),
            fresh_cache(),
        ):
            yield


class _Generated(BaseException):
    """Ends a compilation whose code is there."""


def _triton_launches(compile_one: Callable[[], Any]) -> int:
    """Launches in the Triton code that a compilation generates, which then ends."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    # Inductor asks for which GPU the code is.
    hopper = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    generate = GraphLowering.codegen

    def codegen(self: GraphLowering) -> Any:
        wrapper, _ = generate(self)
        raise _Generated(wrapper.value)

    with (
        patch.object(driver, "_active", hopper),
        patch.object(GraphLowering, "codegen", codegen),
        inductor_config.patch(cpu_backend="triton", compile_threads=1),
    ):
        try:
            compile_one()
        except _Generated as end:
            return launches_in(str(end))
    raise AssertionError("inductor has compiled without generating code")


def launches_in(code: str) -> int:
    """Kernels and operations of PyTorch that a module of inductor's launches."""
    kernels = re.findall(r"^\s+triton_\w+\.run\(", code, flags=re.M)
    others = re.findall(
        r"^\s+(?:\w+ = )?(?:torch\.ops\.|extern_kernels\.|aten\.)\S+\(",
        code,
        flags=re.M,
    )
    return len(kernels) + len(others)
