# SPDX-License-Identifier: Apache-2.0
"""The step as one function: compiled, padded, alone, among others: always the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from step_bench import StepBench, alone
from torch._dynamo.utils import counters

from vllm_dlm.model_executor.sampling.step_function import NOT_COMPILED
from vllm_dlm.strategies import STRATEGIES

CASES: dict[str, dict[str, Any]] = {
    name: {} for name in STRATEGIES if not STRATEGIES[name].needs & NOT_COMPILED
}
del CASES["pc"], CASES["replay"]  # Want files, or another request's steps.
KINDS = [("full", 0), ("full", 1), ("block", 0), ("block", 1)]
"""Attention and shift of models."""


def serves(strategy: str, attention: str) -> bool:
    return attention == "full" or STRATEGIES[strategy].scope != "canvas"


@pytest.fixture(autouse=True)
def as_the_runner_does():
    with torch.inference_mode():
        yield


def assert_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Bit for bit; NaN equals NaN."""
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name
        )


def poison(bench: StepBench, value: int) -> None:
    """Write to all of the dummy slot that a step may write to."""
    table = bench.table
    table.tokens[-1], table.masked[-1] = value, bool(value)
    table.live[-1] = value
    for field in bench.group.memory.values():
        field[0] = value


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("strategy", CASES)
def test_a_request_is_decided_as_if_it_were_alone(strategy: str, kind: tuple[str, int]):
    if not serves(strategy, kind[0]):
        pytest.skip("decodes a canvas as one block")
    bench = StepBench(strategy, *kind, seed=5)
    slots = list(range(bench.table.num_slots))
    bench.measure()
    before, packed = bench.state(), bench.packed(slots)
    together = bench.run(bench.function.step, packed, len(slots))
    for row, slot in enumerate(slots):
        bench.restore(before)
        # Whatever a padded row left there.
        poison(bench, row)
        plan = alone(packed, row, bench.table.num_slots)
        got = bench.run(bench.function.step, plan, 1)
        wanted = bench.state() | {
            name: together[name][slot : slot + 1]
            for name in ("tokens of the reply", "masks")
        }
        wanted["counts"] = together["counts"][:, slot : slot + 1]
        for name, tensor in bench.state().items():
            tensor[slot] = together[name][slot]
            wanted[name] = tensor
        assert_equal(got, wanted)
        # No other request was touched.
        for name, tensor in before.items():
            others = torch.arange(len(slots)) != slot
            assert torch.equal(got[name][others], tensor[others])


def check_compiled(strategy: str, attention: str, shift: int) -> None:
    """The compiled step against the same function as it stands, in random states."""
    bench = StepBench(strategy, attention, shift)
    bench.function.compile(bench.choice)
    assert bench.function.compiled is not None
    graphs = counters["stats"]["unique_graphs"]
    for seed, count in enumerate((9, 2, 5, 1, 9, 3)):
        other = StepBench(strategy, attention, shift, seed=seed)
        bench.table.facts.copy_(other.table.facts)
        bench.table.facts_f.copy_(other.table.facts_f)
        bench.restore(other.state())
        bench.measure()
        if seed == 4:
            # More seats than there were.
            bench.group.memory = {
                name: torch.cat([field, field])
                for name, field in bench.group.memory.items()
            }
        slots = bench.random.sample(range(bench.table.num_slots), count)
        before, packed = bench.state(), bench.packed(slots)
        wanted = bench.run(bench.function.step, packed, count)
        bench.restore(before)
        got = bench.run(bench.function.compiled, packed, count)
        assert_equal(got, wanted)
    assert counters["stats"]["unique_graphs"] == graphs


COMPILED = {
    "static": ("block", 0),  # a schedule
    "threshold": ("full", 1),  # the default
    "factor": ("block", 1),  # an order of confidences
    "slowfast": ("full", 0),  # what it remembers
    "saber": ("full", 1),  # what it masks again
    "hierarchy": ("block", 1),  # places
    "learn2pd": ("full", 0),  # a filter
    "multi_block": ("full", 0),  # a canvas decided together
}
"""Strategies that read different parts of a step, and a kind of model for each."""


@pytest.mark.slow  # By default engine/test_compiled.py has the oracle's tokens.
@pytest.mark.parametrize("strategy", COMPILED)
def test_a_compiled_step_decides_the_same(strategy: str):
    """A compilation takes half a minute; testing/ traces every strategy."""
    check_compiled(strategy, *COMPILED[strategy])


@pytest.mark.slow  # So do those of an engine in engine/test_compiled.py.
def test_two_groups_have_graphs_of_their_own():
    """Their functions are one piece of code: a graph of one must not serve another."""
    benches = [StepBench(name) for name in ("threshold", "static")]
    for bench in benches:
        bench.function.compile(bench.choice)
    for bench in benches:
        bench.measure()
        before, packed = bench.state(), bench.packed([0, 1, 2])
        wanted = bench.run(bench.function.step, packed, 3)
        bench.restore(before)
        assert_equal(bench.run(bench.function.compiled, packed, 3), wanted)


class Peeking(STRATEGIES["threshold"]):  # type: ignore[misc]
    """Looks at a value on the host, which no compiled step can."""

    def select(self, view, row_params):
        if view.confidence.sum().item() > -1:
            return super().select(view, row_params)
        raise AssertionError


def test_what_cannot_be_compiled_is_said_and_runs_as_it_stands(caplog):
    bench = StepBench("threshold")
    bench.group.strategy.__class__ = Peeking
    bench.function.compile(bench.choice)
    assert bench.function.compiled is None
    (line,) = [r.getMessage() for r in caplog.records if "not compiled" in r.message]
    assert "threshold" in line and "\n" not in line
    bench.measure()
    packed = bench.packed([0, 1])
    assert bench.run(bench.function.step, packed, 2)["counts"].shape == (6, 2)
