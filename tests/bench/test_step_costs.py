# SPDX-License-Identifier: Apache-2.0
"""What is counted of a worker beside time, on objects whose sizes are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from vllm_dlm.bench.step_costs import StepCosts, allocations, held_tensors, state_bytes

CPU = torch.device("cpu")
KIB = 1024


class Part:
    """An object of this package, as far as its module's name goes."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


Part.__module__ = "vllm_dlm.somewhere"


class Slotted:
    __slots__ = ("table",)


Slotted.__module__ = "vllm.somewhere"


def bytes_of(number: int) -> torch.Tensor:
    return torch.zeros(number, dtype=torch.uint8)


def test_the_most_that_is_allocated_at_a_time():
    kept = bytes_of(64 * KIB)
    with allocations(CPU) as most:
        first = bytes_of(8 * KIB)
        del first
        second, third = bytes_of(3 * KIB), bytes_of(6 * KIB)
        del second
        fourth = bytes_of(2 * KIB)
    assert most == [9 * KIB]
    with allocations(CPU) as most:
        del third, fourth, kept
    assert most == [0]


def test_tensors_are_found_wherever_they_are_held():
    slotted = Slotted()
    slotted.table = bytes_of(1)
    other = Part(big=bytes_of(64))
    root = Part(
        mapping={"a": [bytes_of(2), (bytes_of(3),)]},
        inner=Part(own=bytes_of(4), slotted=slotted),
        network=torch.nn.Linear(8, 8),
        foreign=SimpleNamespace(tensor=bytes_of(32)),
        other=other,
    )
    root.inner.back = root
    sizes = [len(tensor) for tensor in held_tensors([root], without=[other])]
    assert sorted(sizes) == [1, 2, 3, 4]


class Runner:
    """A runner whose steps are known: 2 KiB of input and two operations."""

    device = CPU

    def __init__(self) -> None:
        self.model = torch.nn.Linear(8, 8)
        self.req_states = Part(table=bytes_of(99))
        shared = bytes_of(10)
        self.sampler = Part(
            views=[shared[:5], shared],
            weight=self.model.weight,
            requests=self.req_states,
            runner=self,
        )
        self.model_state = Part(
            buffer=bytes_of(7),
            preprocess_state=lambda: None,
            prepare_inputs=lambda: bytes_of(8 * KIB),
            prepare_attn=lambda: None,
        )

    def sample(self, rows: int) -> torch.Tensor:
        return torch.zeros(rows, KIB).sum(dim=1)


Runner.__module__ = "vllm.somewhere"


def test_weights_and_vllms_own_tables_are_no_state():
    assert state_bytes(Runner()) == 10 + 7


def test_steps_are_counted_until_the_end():
    runner = Runner()
    plain = runner.sample
    costs = StepCosts(runner)
    costs.start()
    for rows in (2, 5, 3):
        runner.model_state.prepare_inputs()
        runner.sample(rows)
    found = costs.end()
    runner.sample(50)
    assert found.steps == 3
    # A tensor of zeros in one, and in the other a sum too.
    assert found.launches == 3 * (1 + 2)
    assert found.sampling_bytes == 4 * (5 * KIB + 5)
    assert found.state_bytes == 17
    assert runner.sample.__func__ is plain.__func__
