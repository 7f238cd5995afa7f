# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.rewriting_rules import ass as rule
from reference.rewriting_rules import doubling
from reference.views import CPU, make_view, select
from reference.walks import assert_agrees, assert_rows_alone, random_block

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.ass import Ass, doubling_count, doubling_steps
from vllm_dlm.strategies.base import Params


def ass(width: int = 6) -> Ass:
    return Ass(Params(), width, CPU)


def counts(masks: int) -> list[int]:
    """Tokens of each step of a block of `masks`."""
    block = torch.tensor([masks])
    steps = int(doubling_steps(block))
    found = [int(doubling_count(torch.tensor([step]), block)) for step in range(steps)]
    return [*found[:-1], masks - sum(found[:-1])]


@pytest.mark.parametrize(
    ("masks", "tokens"),
    [
        (1, [1]),
        (2, [2]),
        (3, [3]),
        (4, [1, 3]),
        (7, [1, 6]),
        (8, [1, 2, 5]),
        (16, [1, 2, 4, 9]),
        (256, [1, 2, 4, 8, 16, 32, 64, 129]),
    ],
)
def test_schedule(masks, tokens):
    assert counts(masks) == doubling(masks) == tokens


@given(masks=st.integers(1, 2**20) | st.integers(0, 20).map(lambda n: 2**n))
def test_schedules_add_up(masks):
    assert counts(masks) == doubling(masks)
    assert sum(counts(masks)) == masks
    assert min(counts(masks)) > 0


def test_the_most_confident_first():
    confidence = torch.linspace(0.1, 0.8, 8)
    masked = torch.ones(1, 8, dtype=torch.bool)
    state, found = {}, []
    for step in range(3):
        view = make_view(
            confidence[None], masked, state=state, step=torch.tensor([step])
        )
        decision = select(ass(8), view)
        found.append(decision.commit[0].nonzero()[:, 0].tolist())
        masked, state = masked & ~decision.commit, decision.state
    assert found == [[7], [5, 6], [0, 1, 2, 3, 4]]


@given(seed=st.integers(0, 2**20), width=st.integers(1, 20))
def test_agrees_with_the_row_wise_reference(seed, width):
    view, probabilities = random_block(seed, width=width)
    assert_agrees(ass(width), rule, view, probabilities, [{}] * 4)


@given(seed=st.integers(0, 2**20))
def test_other_rows_do_not_matter(seed):
    view, probabilities = random_block(seed, width=12)
    assert_rows_alone(ass(12), view, probabilities, [{}] * 4)


def test_registered():
    assert STRATEGIES["ass"] is Ass
    assert Ass.scope == "canvas"
    assert Ass.Params.model_fields == {}
