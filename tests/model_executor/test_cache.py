# SPDX-License-Identifier: Apache-2.0
"""Rows of a step, canvas widths and step schedules, by hand."""

import pytest

from vllm_dlm.model_executor.cache import (
    POLICIES,
    canvas_width,
    plan_rows,
    steps_per_block,
)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_refresh_computes_everything(policy):
    assert plan_rows(policy, True, 40, 16, 72) == (0, 72)


@pytest.mark.parametrize(
    ("policy", "rows"), [("none", (0, 72)), ("prefix", (40, 72)), ("dual", (40, 56))]
)
def test_inner_steps(policy, rows):
    assert plan_rows(policy, False, 40, 16, 72) == rows


def test_the_last_block_of_a_canvas_may_be_short():
    assert plan_rows("dual", False, 40, 16, 45) == (40, 45)


@pytest.mark.parametrize(
    ("tokens", "block", "most", "width"),
    [(1, 8, 64, 8), (8, 8, 64, 8), (9, 8, 64, 16), (500, 8, 64, 64), (500, 8, 63, 56)],
)
def test_a_canvas_is_made_of_whole_blocks(tokens, block, most, width):
    assert canvas_width(tokens, block, most) == width


def test_a_canvas_holds_one_block_at_least():
    assert canvas_width(1, 32, 8) == 32


@pytest.mark.parametrize(
    ("steps", "per_block"), [(None, 16), (64, 16), (32, 8), (4, 1), (1, 1), (999, 16)]
)
def test_steps_are_spread_evenly_over_the_blocks(steps, per_block):
    assert steps_per_block(steps, 64, 16) == per_block
