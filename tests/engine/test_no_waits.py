# SPDX-License-Identifier: Apache-2.0
"""A step asks the device nothing: what would stop a GPU's queue is not called.

Reading a number (`.item()`, `.tolist()`, `if tensor`), `nonzero` and indexing by a
boolean tensor wait for everything that was launched before. What a step has to know of
its predecessor comes with the reply that the scheduler waits for (`host_slots.py`).
"""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from engine.harness import Engine
from engine.test_mixed import make_request, one_per_strategy
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "_unique2",
}


class Waits(TorchDispatchMode):
    """Collects calls that would wait for a GPU, made by this package."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, call, types, args=(), kwargs=None) -> Any:
        name = call.overloadpacket.__name__
        flags = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for argument in args
            if isinstance(argument, list | tuple)
            for index in argument
        )
        if flags or name in WAITING:
            ours = [f for f in traceback.extract_stack() if "vllm_dlm" in f.filename]
            if ours:
                self.seen.add(f"{name}: {ours[-1].name}: {ours[-1].line}")
        return call(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", sorted(one_per_strategy().values()))
def test_steps_do_not_wait(wide_engine: Engine, rule: str):
    """Two requests, one of them drawn at a temperature."""
    requests = [make_request(number, rule) for number in (2, 3)]
    for prompt, sampling in requests:
        wide_engine.add(prompt, sampling)
    wide_engine.step()  # what is made of a request once
    with Waits() as waits:
        for _ in range(6):
            wide_engine.step()
    while wide_engine.busy:
        wide_engine.step()
    assert not waits.seen
