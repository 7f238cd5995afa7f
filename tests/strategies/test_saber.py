# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reference.rewriting_rules import saber as rule
from reference.views import CPU, make_view, select
from reference.walks import assert_agrees, assert_rows_alone, random_block, walk

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import numeric_fields
from vllm_dlm.strategies.saber import NEVER, Saber, SaberParams, mean_written


def saber(fewest: int = 2, width: int = 6) -> Saber:
    return Saber(SaberParams(fewest=fewest), width, CPU)


def decode(
    strategy: Saber, confidences: list[list[float]]
) -> list[tuple[list[int], list[int], list[int]]]:
    """What each step writes, takes back, and leaves written."""
    masked = torch.ones(1, len(confidences[0]), dtype=torch.bool)
    state: Any = {}
    found = []
    for confidence in confidences:
        decision = select(strategy, make_view([confidence], masked, state=state))
        state = decision.state
        masked = (masked & ~decision.commit) | decision.remask
        parts = (decision.commit, decision.remask, ~masked)
        found.append(tuple(part[0].nonzero()[:, 0].tolist() for part in parts))
    return found


def test_worked_canvas():
    steps = decode(
        saber(),
        [
            # The bar is 1: the two best, 0 and 2, of which 2 has gained less.
            [0.95, 0.70, 0.85, 0.60, 0.50, 0.40],
            # .90, of .95 and .85: 1 and 3. 0 has gained .01.
            [0.96, 0.91, 0.60, 0.93, 0.55, 0.45],
        ],
    )
    assert steps == [([0], [], [0]), ([1, 3], [0], [1, 3])]


def test_nothing_is_taken_back_with_the_last_mask():
    steps = decode(saber(width=3), [[0.9, 0.8, 0.7]] * 3)
    # Then the bar is .85, with two masks left: both, and the block is done.
    assert steps == [([0], [], [0]), ([1, 2], [], [0, 1, 2]), ([], [], [0, 1, 2])]


@pytest.mark.parametrize(
    ("fewest", "masks", "taken_back"),
    [(1, 9, 0), (2, 9, 1), (3, 9, 1), (4, 9, 2), (9, 12, 4), (9, 9, 0), (20, 9, 0)],
)
def test_how_many_are_taken_back(fewest, masks, taken_back):
    confidence = torch.linspace(0.9, 0.1, masks).tolist()
    [(written, _, _)] = decode(saber(fewest, masks), [confidence])
    assert len(written) == min(fewest, masks) - taken_back


def test_an_eighth_of_many_is_taken_back():
    """16 of 18 are above the bar of .5: an eighth is 2."""
    first = [0.5] + [0.4] * 17
    then = [0.5] + [0.8] + [0.9] * 15 + [0.45]
    steps = decode(saber(1, 18), [first, then])
    assert steps[0] == ([0], [], [0])
    # 0 has not gained, 1 less than the others.
    others = list(range(2, 17))
    assert steps[1] == (others, [0], others)


def test_the_mean_counts_positions_that_were_taken_back():
    known = torch.tensor([[0.9, NEVER, 0.5, NEVER], [NEVER] * 4, [0.0, 1.0, 0.5, 0.5]])
    assert mean_written(known).tolist() == pytest.approx([0.7, 1.0, 0.5])


@given(
    seed=st.integers(0, 2**20),
    fewest=st.lists(st.integers(1, 7), min_size=4, max_size=4),
)
def test_agrees_with_the_row_wise_reference(seed, fewest):
    view, probabilities = random_block(seed)
    rows = [{"fewest": count} for count in fewest]
    assert_agrees(saber(), rule, view, probabilities, rows)


@given(seed=st.integers(0, 2**20))
def test_other_rows_do_not_matter(seed):
    view, probabilities = random_block(seed)
    rows = [{"fewest": count} for count in (2, 1, 3, 5)]
    assert_rows_alone(saber(), view, probabilities, rows)


@given(seed=st.integers(0, 2**20), fewest=st.integers(1, 7))
def test_every_step_gains_a_token(seed, fewest):
    view, probabilities = random_block(seed)
    steps = walk(saber(), view, probabilities, [{"fewest": fewest}] * 4)
    for seen, decision in steps:
        gained = decision.commit.sum(dim=1) - decision.remask.sum(dim=1)
        assert (gained >= seen.masked.any(dim=1).long()).all()
        assert not (decision.commit & ~seen.masked).any()
        assert not (decision.remask & ~seen.decided).any()


def test_registered_with_bounds():
    assert STRATEGIES["saber"] is Saber
    assert Saber.scope == "canvas" and Saber.may_rewrite
    assert SaberParams().model_dump() == {"fewest": 2}
    assert numeric_fields(SaberParams) == ["fewest"]
    for bad in ({"fewest": 0}, {"fewest": 10**7}, {"most": 3}):
        with pytest.raises(ValidationError):
            SaberParams(**bad)
