# SPDX-License-Identifier: Apache-2.0
"""Whether a strategy can be compiled, and what it decides then.

The engine compiles a step, the strategy in it, as one function of any number of rows
(`torch.compile`, `fullgraph=True`), and drops the guards: it never calls the function
with anything but other numbers in the same tensors. So it is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from vllm_dlm.strategies.base import Decision, Strategy, View

EAGER_NEEDS = ("probabilities", "branches")
"""Statistics with which a step is not compiled."""

FIELDS = tuple(field.name for field in fields(Decision))

Tensors = dict[str, Any]


def why_eager(strategy: Strategy) -> str | None:
    """Why the engine would not even try to compile it; None if it would."""
    read = [need for need in EAGER_NEEDS if need in strategy.needs]
    return f"it reads View.{read[0]}" if read else None


def compile_and_compare(
    strategy: Strategy,
    calls: Sequence[tuple[View, Mapping[str, torch.Tensor]]],
    runs_kernels: bool,
    found: list[Decision],
) -> str | None:
    """Decide some steps by one compiled function.

    Args:
        calls: view and numeric parameters of each; 2 rows at least.
        runs_kernels: compile to kernels; else the traced operations run as they are,
            which costs little.
        found: gets their decisions.

    Returns:
        Why it cannot be compiled, in one line; None if it can.
    """

    def decide(view: Tensors, numbers: dict[str, torch.Tensor]) -> Tensors:
        decision = strategy.select(View(**view), numbers)
        return {name: getattr(decision, name) for name in FIELDS}

    # Graphs belong to a code object, that of `decide`: without guards, one strategy
    # would run another's, if they were not kept apart.
    compiled: Callable[..., Tensors] = torch.compile(  # type: ignore[call-overload]
        decide,
        fullgraph=True,
        backend="inductor" if runs_kernels else "eager",
        isolate_recompiles=True,
        options={"guard_filter_fn": lambda guards: [False] * len(guards)},
    )
    for view, numbers in calls:
        tensors = {name: value for name, value in vars(view).items()}
        for tensor in _tensors([tensors, dict(numbers)]):
            torch._dynamo.mark_dynamic(tensor, 0)
        try:
            with torch.inference_mode():
                made = compiled(tensors, dict(numbers))
        except Exception as error:  # what it may be is up to the strategy
            return why(error)
        found.append(Decision(**made))
    return None


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    members = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping | list):
        return []
    return [tensor for member in members for tensor in _tensors(member)]


def why(error: Exception) -> str:
    """What has failed, and in which line of the strategy; in one line."""
    text = str(error)
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if "data-dependent" in text:
        first = "what is executed depends on a number of the device"
    elif "Constraints violated" in text:
        first = "its operations depend on the number of rows, as in a loop over these"
    else:
        # The compiler's own words.
        errors = [line for line in text.splitlines() if " error: " in line]
        if errors:
            first = f"{first}: {errors[0].partition(' error: ')[2]}"
    _, _, code = text.partition("from user code:")
    lines = [line.strip() for line in code.splitlines()]
    places = [line for line in lines if line.startswith("File ")]
    if not places:
        return first
    source = lines[lines.index(places[-1]) + 1]
    return f"{first} ({places[-1]}: {source})"
