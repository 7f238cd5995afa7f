# SPDX-License-Identifier: Apache-2.0
"""Traces of steps made by hand: what is labelled how, and what recording costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from reference.recording import Batch
from reference.views import make_view
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_dlm.learn2pd.recorder import IGNORED, RIGHT, WRONG, TraceRecorder


def following(requests: int, width: int) -> tuple[Batch, TraceRecorder]:
    batch = Batch(requests, width)
    recorder = TraceRecorder(batch.slots)
    for slot in range(requests):
        recorder.follow(slot)
    return batch, recorder


def test_labels_of_a_block():
    batch, recorder = following(1, 4)
    # The canvas ends before position 3. Best tokens are 5, 6, 7.
    short = torch.tensor([[True, True, True, False]])
    view = make_view([[0.9, 0.5, 0.6, 0.0]], short, valid=short)
    first = replace(view, candidate=torch.tensor([[5, 6, 7, 0]]))
    recorder.record(first, torch.tensor([[5, -1, -1, -1]]), batch.plan)
    batch.go_on()
    assert recorder.rows(4, "none") == 0
    second = replace(
        first,
        masked=torch.tensor([[False, True, True, False]]),
        candidate=torch.tensor([[5, 8, 7, 0]]),
        confidence=torch.tensor([[0.95, 0.8, 0.7, 0.0]]),
    )
    recorder.record(second, torch.tensor([[5, 8, 7, -1]]), batch.plan)
    batch.go_on(ended=True)
    traces = recorder.traces(4, "none")
    assert traces.confidence == pytest.approx(
        np.array([[0.9, 0.5, 0.6, 1.0], [0.95, 0.8, 0.7, 1.0]])
    )
    assert traces.label.tolist() == [
        [RIGHT, WRONG, RIGHT, IGNORED],
        [IGNORED, RIGHT, RIGHT, IGNORED],
    ]
    assert traces.block.tolist() == [1, 1]


def test_a_request_that_leaves_teaches_what_it_has_decided():
    batch, recorder = following(2, 2)
    masked = torch.ones(2, 2, dtype=torch.bool)
    view = make_view(torch.rand(2, 2), masked, candidate=masked.long() * 3)
    recorder.record(view, torch.tensor([[3, -1], [-1, 4]]), batch.plan)
    batch.go_on()
    for slot in (0, 1):
        recorder.forget(slot)
    traces = recorder.traces(2, "none")
    assert traces.label.tolist() == [[RIGHT, IGNORED], [IGNORED, WRONG]]
    assert traces.block.tolist() == [1, 2]
    # It has left: nothing of later steps is kept.
    recorder.record(view, torch.full((2, 2), 3), batch.plan)
    batch.go_on(ended=True)
    assert recorder.rows(2, "none") == 2


def test_each_request_has_blocks_of_its_own():
    batch, recorder = following(3, 2)
    masked = torch.ones(3, 2, dtype=torch.bool)
    view = make_view(torch.rand(3, 2), masked, candidate=masked.long() * 3)
    for step in range(6):
        recorder.record(view, torch.full((3, 2), 3), batch.plan)
        batch.go_on(torch.tensor([True, step % 2 == 1, step % 3 == 2]))
    blocks = recorder.traces(2, "none").block
    assert sorted(np.bincount(blocks)[1:].tolist()) == [1] * 6 + [2] * 3 + [3] * 2


class Calls(TorchDispatchMode):
    """Names of the tensor operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, call, types, args=(), kwargs=None) -> Any:
        self.names.append(call.overloadpacket.__name__)
        return call(*args, **(kwargs or {}))


def open_steps(requests: int, steps: int) -> tuple[Batch, TraceRecorder, list[str]]:
    """Steps that end no block of 32, and the tensor operations of the last one."""
    batch, recorder = following(requests, 32)
    masked = torch.ones(requests, 32, dtype=torch.bool)
    view = make_view(torch.rand(requests, 32), masked)
    written = torch.full((requests, 32), -1)
    for _ in range(steps):
        with Calls() as calls:
            recorder.record(view, written, batch.plan)
        batch.go_on()
    return batch, recorder, calls.names


def test_a_step_takes_as_many_operations_for_any_batch():
    """One piece goes to the host, and nothing waits for the device."""
    few, many = open_steps(2, 3)[2], open_steps(256, 3)[2]
    assert few == many
    assert len(many) <= 16
    assert not {"nonzero", "_local_scalar_dense", "masked_select"} & set(many)


def test_all_blocks_that_end_take_one():
    batch, recorder, _ = open_steps(256, 3)
    batch.go_on(ended=True)
    batch.host.settle(np.arange(256))
    with Calls() as calls:
        assert recorder.rows(32, "none") == 3 * 256
        for slot in range(256):
            recorder.forget(slot)
    assert calls.names == ["detach"]  # the step that has arrived becomes an array


def test_memory_is_that_of_the_rows():
    """Confidence, best token and final token of each position, 4 bytes each."""
    _, recorder, _ = open_steps(256, 9)
    kept = [row for rows in recorder._steps.values() for row in rows]
    assert len(kept) == 8 * 256  # the ninth step is on its way
    assert all(row.base is None for row in kept)
    assert sum(row.nbytes for row in kept) == 8 * 256 * 32 * 12
