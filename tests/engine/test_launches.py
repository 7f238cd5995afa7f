# SPDX-License-Identifier: Apache-2.0
"""What a step asks a GPU to launch outside the network, counted on a CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from engine.harness import Engine

# The benchmarks are no part of the package.
sys.path.append(str(Path(__file__).parents[2]))
from benchmarks.launches import BATCHES, MIXED, Count, count  # noqa: E402
from vllm_dlm.bench.launch_counter import STEP_PARTS  # noqa: E402

sys.path.pop()

MOST_OPERATIONS = 360
"""Of each group of requests; `test_compiled.py` has those that are compiled."""
MOST_COPIES = 1
"""Of the whole step."""


def launches(engine: Engine, batch: str, requests: int) -> Count:
    return count(engine.llm, "eager", batch, requests)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_step_launches_the_same_for_any_number_of_requests(
    wide_engine: Engine, batch: str
):
    groups = len(BATCHES[batch])
    numbers = (groups, 4, 16)
    few, more, many = (launches(wide_engine, batch, number) for number in numbers)
    assert set(few.parts) == set(STEP_PARTS)
    assert few.parts["sampler"].total > 0
    assert few.parts == more.parts == many.parts
    # Nothing is launched for requests that do not come.
    assert few.step.total == sum(part.total for part in few.parts.values())
    assert few.step.num_operations <= groups * MOST_OPERATIONS
    assert few.step.copies <= MOST_COPIES


def test_a_further_group_launches_less_than_a_step_of_its_own(wide_engine: Engine):
    together = launches(wide_engine, "4 strategies", 4).step.num_operations
    alone = [launches(wide_engine, name, 1).step.num_operations for name in MIXED]
    assert max(alone) < together < sum(alone)


def test_an_admission_launches_no_more_than_one_alone(wide_engine: Engine):
    """Once the strategy has decided others."""
    one, four = (launches(wide_engine, "static", n).admission for n in (1, 4))
    assert 0 < four.total == one.total <= 4
