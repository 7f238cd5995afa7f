# SPDX-License-Identifier: Apache-2.0
"""Rows of a step under each cache policy, by hand."""

from typing import get_args

import pytest
import torch

from vllm_dlm.config.cache import POLICIES, Cache, Reach
from vllm_dlm.model_executor.layout import (
    ALWAYS,
    next_start,
    part_rows,
    part_start,
    plan_rows,
)

VICINITY = {"look_back": 6, "look_ahead": 5, "warmup_steps": 2}
WINDOW = {"active_window": 4, "external_window": 10, "refresh_every": 3}


def rows(
    policy: Cache,
    step: int,
    *,
    start: int = 40,
    shift: int = 0,
    end: int = 72,
    first: bool = False,
    phase: int = 43,
    masks_end: int | None = None,
    reads_block: bool = False,
    **config: int,
) -> tuple[int, int]:
    """Rows of a step of a block of 16 on a canvas that ends at `end`."""
    return plan_rows(
        POLICIES[policy](**config).reach(shift, reads_block),
        step=step,
        is_first_block=first,
        block_start=start,
        block_length=16,
        phase=phase,
        masks_end=masks_end,
        canvas_end=end,
    )


def test_every_policy_has_a_name():
    assert tuple(POLICIES) == get_args(Cache)


@pytest.mark.parametrize(
    ("frontier", "wanted"),
    [
        (64, (64, 96)),  # the first sub-block's first token is missing
        (65, (64, 72)),
        (71, (64, 72)),
        (72, (64, 96)),  # the second one's
        (79, (72, 80)),
        (89, (88, 96)),
    ],
)
def test_a_sub_block_is_computed_alone_once_it_has_begun(frontier, wanted):
    dual = POLICIES["dual"]().reach(1, reads_block=False, part=8)
    place = {"block_start": 64, "block_end": 96, "frontier": frontier}
    assert part_rows(dual, **place) == wanted
    # Who reads or rewrites the block needs all of it.
    reads = POLICIES["dual"]().reach(1, reads_block=True, part=8)
    for whole in (reads, POLICIES["none"]().reach(1, reads_block=False, part=8)):
        assert part_rows(whole, **place) == (64, 96)


def test_sub_blocks_end_with_the_block():
    dual = POLICIES["dual"]().reach(0, reads_block=False, part=7)
    assert part_rows(dual, block_start=0, block_end=16, frontier=15) == (14, 16)
    # And the block where the canvas does.
    assert part_rows(dual, block_start=0, block_end=11, frontier=8) == (7, 11)


def test_the_worker_begins_sub_blocks_where_the_scheduler_does():
    places = [
        (part, 32 + offset) for part in (1, 3, 8, 1 << 30) for offset in (*range(32),)
    ]
    parts, frontiers = torch.tensor(places).unbind(dim=1)
    starts = part_start(Reach(part=parts), torch.tensor(32), frontiers)
    assert starts.tolist() == [
        part_rows(Reach(part=part), block_start=32, block_end=64, frontier=at).start
        for part, at in places
    ]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_blocks_first_step_computes_everything(policy):
    assert rows(policy, 0) == (0, 72)


def test_or_all_that_a_window_sees():
    assert rows("window", 0, **WINDOW) == (0, 50)
    assert rows("window", 0, end=48, **WINDOW) == (0, 48)
    assert rows("window", 0, reads_block=True, **WINDOW) == (0, 62)


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        ("none", (0, 72)),
        ("prefix", (40, 72)),
        ("dual", (40, 56)),
        ("vicinity", (24, 72)),
        ("window", (43, 72)),
    ],
)
def test_inner_steps(policy, wanted):
    assert rows(policy, 1) == wanted


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [("prefix", (39, 72)), ("dual", (39, 56)), ("window", (42, 72))],
)
def test_a_shift_computes_the_row_to_the_left(policy, wanted):
    assert rows(policy, 1, shift=1) == wanted


def test_the_last_block_of_a_canvas_may_be_short():
    assert rows("dual", 1, end=45) == (40, 45)


def test_vicinity():
    assert rows("vicinity", 1, **VICINITY) == (34, 61)
    assert rows("vicinity", 1, end=58, **VICINITY) == (34, 58)
    assert rows("vicinity", 1, start=3, **VICINITY) == (0, 24)
    # What it looks back to holds the row that a shift needs.
    assert rows("vicinity", 1, shift=1, **VICINITY) == (34, 61)
    assert rows("vicinity", 1, shift=1, **VICINITY | {"look_back": 0}) == (39, 61)


def test_vicinity_warms_up_in_the_first_block_alone():
    steps = [rows("vicinity", step, first=True, **VICINITY) for step in range(4)]
    assert steps == [(0, 72), (0, 72), (0, 72), (34, 61)]
    assert rows("vicinity", 1, **VICINITY) == (34, 61)


def test_window():
    steps = [rows("window", step, masks_end=51, **WINDOW) for step in range(1, 5)]
    assert steps == [(43, 51), (43, 51), (0, 51), (43, 51)]
    assert rows("window", 1, end=47, masks_end=51, **WINDOW) == (43, 47)
    assert rows("window", 1, reads_block=True, **WINDOW) == (40, 56)
    assert rows("window", 3, reads_block=True, **WINDOW) == (0, 62)


def test_a_window_that_has_seen_the_end_computes_all_that_is_left():
    assert rows("window", 1, phase=ALWAYS, masks_end=51, **WINDOW) == (0, 51)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shift", [0, 1])
def test_the_worker_starts_where_the_scheduler_does(policy, shift):
    """The same on tensors, of many requests."""
    reach = POLICIES[policy]().reach(shift, reads_block=False)
    cases = [
        (step, first, start, phase)
        for step in (0, 1, 4, 5, 31, 32, 64)
        for first in (False, True)
        for start in (1, 5, 16, 40)
        for phase in (start + 2, ALWAYS)
        if phase != ALWAYS or policy == "window"
    ]
    starts = next_start(
        Reach(*torch.tensor([reach] * len(cases)).unbind(dim=1)),
        *map(torch.tensor, zip(*cases, strict=True)),
    )
    assert starts.tolist() == [
        rows(policy, step, shift=shift, first=first, start=start, phase=phase)[0]
        for step, first, start, phase in cases
    ]
