# SPDX-License-Identifier: Apache-2.0
"""What counts as a launch: operations, copies, and compiled functions' kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from vllm_dlm.bench.launch_counter import (
    LaunchCounter,
    Launches,
    TritonTwins,
    launches_in,
)


class Parts:
    """An engine's parts, of which each does the same."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work

    def __call__(self) -> object:
        return self._work()

    preprocess_state = prepare_inputs = prepare_attn = __call__
    add_request = apply_staged_writes = __call__


def launches(
    work: Callable[[], object], twins: TritonTwins | None = None
) -> dict[str, Launches]:
    """What each part of a step launches, if that is `work`, and the admission's two."""
    state, sampler = Parts(work), Parts(work)
    runner = SimpleNamespace(model_state=state, sampler=sampler)
    with torch.inference_mode():
        with LaunchCounter(twins).counting(runner) as counter:
            state.preprocess_state()
            state.prepare_inputs()
            state.prepare_attn()
            sampler()
            state.add_request()
            sampler.add_request()
        sampler()  # not counted
    return counter.take()


def count(work: Callable[[], object]) -> Launches:
    return launches(work)["sampler"]


NUMBERS = torch.arange(12.0).reshape(3, 4)


def test_each_part_counts_for_itself():
    found = launches(lambda: NUMBERS + 1)
    assert {name: dict(one.operations) for name, one in found.items()} == {
        **dict.fromkeys(("plan", "inputs", "attention", "sampler"), {"add": 1}),
        "admission": {"add": 2},
    }


def test_a_step_is_all_but_admissions():
    counter = LaunchCounter()
    counter.parts = launches(lambda: NUMBERS + 1)
    assert counter.step().num_operations == 4
    assert counter.step().total == 0


def test_views_and_allocations_launch_nothing():
    def look() -> None:
        NUMBERS.view(4, 3).t()[1:].unsqueeze(0).expand(5, 2, 4).reshape(5, 8)
        torch.empty_like(NUMBERS)
        NUMBERS.to(torch.float32), NUMBERS.contiguous(), NUMBERS.split(1)

    # A view of `reshape` that cannot be one is a copy.
    assert dict(count(look).operations) == {"clone": 1}


def test_what_is_made_up_of_operations_counts_as_those():
    counted = count(lambda: torch.where(NUMBERS > 3, NUMBERS.long(), 0))
    assert dict(counted.operations) == {
        **dict.fromkeys(("gt", "_to_copy", "scalar_tensor", "where"), 1)
    }


def test_copies_to_the_device_count_where_none_is_needed():
    counted = count(lambda: torch.tensor(NUMBERS.tolist()).to(NUMBERS.device).to("cpu"))
    assert (counted.num_operations, counted.copies) == (0, 2)
    assert count(lambda: NUMBERS.to(torch.float32)).copies == 0


def test_triton_code_is_read():
    code = """
triton_poi_fused_add_0 = async_compile.triton('triton_poi_fused_add_0', '''
        triton_poi_fused_add_0.run_nothing
''')
        triton_poi_fused_add_0.run(arg0_1, buf0, 12, stream=stream0)
        buf1 = torch.ops.aten.sort.stable(buf0, stable=True)
        extern_kernels.mm(buf0, buf1, out=buf2)
        triton_poi_fused_add_0.run(arg0_1, buf1, 12, stream=stream0)
"""
    assert launches_in(code) == 4


@pytest.mark.parametrize("generates_triton", [False, True])
def test_a_compiled_function_is_its_kernels(generates_triton: bool):
    """And the operations that inductor leaves to PyTorch: here a sort, on a CPU."""
    if generates_triton and importlib.util.find_spec("triton") is None:
        pytest.skip("needs a Triton wheel")

    def work(numbers: torch.Tensor) -> torch.Tensor:
        return (numbers + 1).exp().argsort(dim=1, stable=True) * 2

    eager = count(lambda: work(NUMBERS))
    assert eager.operations == {"add": 1, "exp": 1, "sort": 1, "mul": 1}
    assert (eager.functions, eager.kernels) == (0, 0)
    compiled = torch.compile(work, fullgraph=True, isolate_recompiles=True)
    twins = TritonTwins()
    with torch.inference_mode():
        if generates_triton:
            with twins.generating():
                compiled(NUMBERS)
        else:
            compiled(NUMBERS)
    step = launches(lambda: compiled(NUMBERS), twins)
    for one in step.values():
        calls = 2 if one is step["admission"] else 1
        assert one.operations == {"sort": calls}
        assert (one.functions, one.kernels) == (calls, 2 * calls)
        # Inductor sorts short rows inside a Triton kernel.
        assert one.triton_kernels == (calls if generates_triton else None)
