# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reference import rules
from reference.views import (
    C8,
    CPU,
    chosen,
    make_view,
    random_view,
    select,
    with_probabilities,
)
from reference.walks import (
    FIRST_TEXT,
    assert_agrees,
    assert_rows_alone,
    random_block,
)

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import View, numeric_fields
from vllm_dlm.strategies.prophet import Prophet, ProphetParams, gap
from vllm_dlm.strategies.static import Static, StaticParams

NEVER = {"early": 1e6, "middle": 1e6, "late": 1e6}

numbers = st.fixed_dictionaries(
    {
        "early": st.floats(0.0, 6.0),
        "middle": st.floats(0.0, 5.0),
        "late": st.floats(0.0, 4.0),
        "early_until": st.sampled_from([0.0, 0.2, 0.33, 0.5]),
        "middle_until": st.sampled_from([0.5, 0.67, 1.0]),
        "span": st.integers(1, 8),
        "answer_start": st.sampled_from([-1, 0, 3, 5, 40]),
        "answer_width": st.integers(1, 4),
    }
)


def prophet(width: int = 8, **params: Any) -> Prophet:
    return Prophet(ProphetParams(**params), width, CPU)


def rule(**params: Any):
    return rules.prophet(6, **params, eos_ids=range(FIRST_TEXT))


def gaps_view(gaps: list[float], step: int, steps: int) -> View:
    """All masked; at each position the best logit leads by a gap, less on the right."""
    logits = torch.zeros(1, len(gaps), 3)
    logits[0, :, 0] = torch.tensor(gaps)
    logits[..., 2] = -50.0
    view = with_probabilities(
        make_view([[0.0] * len(gaps)], torch.ones(1, len(gaps), dtype=torch.bool)),
        logits.softmax(dim=-1),
    )
    at = {"step": torch.tensor([step]), "steps": torch.tensor([steps])}
    return replace(view, **at)


def test_the_gap_is_that_of_logits():
    wanted = torch.tensor([[0.0, 0.5, 2.5, 7.5, 20.0, 40.0]])
    found = gap(gaps_view(wanted[0].tolist(), 0, 6))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


# A mean gap of 5 at all eight positions; at 2 and 3 it is 6.
MEAN_5 = [9.0, 1.0, 4.0, 8.0, 5.0, 3.0, 7.0, 3.0]


@pytest.mark.parametrize(
    ("step", "params", "everything"),
    [
        (32, {}, True),  # .33 of the steps are over: 5 is enough
        (31, {}, False),  # 7.5 would be
        (31, {"early": 5.0}, True),
        (31, {"early_until": 0.32}, True),
        (31, {"answer_start": 2, "answer_width": 2}, False),
        (32, {"answer_start": 2, "answer_width": 2}, True),
        (32, {"middle": 5.5}, False),
        (32, {"middle": 5.5, "answer_start": 2, "answer_width": 2}, True),
        (32, {"answer_start": 5, "answer_width": 1}, False),
        (66, {"answer_start": 5, "answer_width": 1}, True),  # 2.5 is enough now
        (66, {"answer_start": 1, "answer_width": 1}, False),
        (65, {"answer_start": 5, "answer_width": 1}, False),
        (99, {"answer_start": 8, "answer_width": 9}, False),  # nothing to look at
        (99, {"answer_start": 7, "answer_width": 9}, True),
    ],
)
def test_worked_block(step, params, everything):
    written = chosen(prophet(**params), gaps_view(MEAN_5, step, 100))
    assert written == ([list(range(8))] if everything else [[0]])


def test_decided_positions_of_the_answer_count_and_others_do_not():
    view = gaps_view(MEAN_5, 50, 100)
    masked = view.masked.clone()
    masked[0, [1, 2]] = False
    view = replace(view, masked=masked, decided=~masked)
    # Of the six masks left the mean is 35 / 6; of the answer 1, 2 it is 2.5.
    everything = [[0, 3, 4, 5, 6, 7]]
    assert chosen(prophet(middle=5.8), view) == everything
    answer = {"answer_start": 1, "answer_width": 2}
    assert chosen(prophet(middle=2.5, **answer), view) == everything
    assert chosen(prophet(middle=2.6, **answer), view) == [[0]]


def test_padding_says_nothing_of_the_answer():
    view = gaps_view(MEAN_5, 50, 100)
    eos = torch.zeros_like(view.masked)
    eos[0, [0, 3]] = True  # 9 and 8; without them the mean is 23 / 6
    view = replace(view, is_eos=eos)
    assert chosen(prophet(), view) == [[0]]
    assert chosen(prophet(middle=3.8), view) == [list(range(8))]
    # Nothing but padding is left: its gaps count.
    view = replace(view, masked=eos)
    assert chosen(prophet(middle=8.5), view) == [[0, 3]]
    assert chosen(prophet(middle=8.6), view) == [[0]]


def test_spans_are_written_one_after_the_other():
    view = gaps_view([1.0, 2.0, 3.0, 9.0, 6.0, 7.0, 8.0, 5.0], 0, 4)
    strategy, order = prophet(span=3, **NEVER), []
    while view.masked.any():
        commit = select(strategy, view).commit
        order.append(commit[0].nonzero()[:, 0].tolist())
        view = replace(view, masked=view.masked & ~commit, step=view.step + 1)
    # Four steps are one for each of three spans.
    assert order == [[0, 1, 2], [3, 4, 5], [6, 7]]


@given(
    seed=st.integers(0, 2**20),
    rows=st.lists(numbers, min_size=4, max_size=4),
    steps=st.integers(1, 9),
)
def test_agrees_with_the_row_wise_reference(seed, rows, steps):
    view, probabilities = random_block(seed)
    view = replace(view, steps=torch.full_like(view.steps, steps))
    assert_agrees(prophet(6), rule, view, probabilities, rows)


@given(seed=st.integers(0, 2**20), rows=st.lists(numbers, min_size=4, max_size=4))
def test_other_rows_do_not_matter(seed, rows):
    view, probabilities = random_block(seed)
    assert_rows_alone(prophet(6), view, probabilities, rows)


@given(seed=st.integers(0, 2**20), steps=st.integers(1, 8), step=st.integers(0, 8))
def test_at_its_limits(seed, steps, step):
    view, probabilities = random_block(seed)
    view = with_probabilities(view, probabilities[0])
    everything = [row.nonzero()[:, 0].tolist() for row in view.masked]
    assert chosen(prophet(6, early=0.0, middle=0.0, late=0.0), view) == everything
    # Never sure: LLaDA's schedule, of which the view's is that of the whole block.
    size, step = view.valid.sum(dim=1), min(step, steps - 1)
    scheduled = (size // steps + (step < size % steps)).clamp(min=1)
    at = {"step": torch.full_like(size, step), "steps": torch.full_like(size, steps)}
    view = replace(view, scheduled=scheduled, **at)
    static = Static(StaticParams(), 6, CPU)
    assert chosen(prophet(6, span=6, **NEVER), view) == chosen(static, view)


def test_a_row_without_masks_commits_nothing():
    view = gaps_view(MEAN_5, 50, 100)
    view = replace(view, masked=torch.zeros_like(view.masked))
    assert chosen(prophet(late=0.0, middle=0.0), view) == [[]]


def test_registered_with_bounds():
    assert STRATEGIES["prophet"] is Prophet
    assert ProphetParams().model_dump() == {
        "early": 7.5,
        "middle": 5.0,
        "late": 2.5,
        "early_until": 0.33,
        "middle_until": 0.67,
        "span": 32,
        "answer_start": -1,
        "answer_width": 5,
    }
    assert numeric_fields(ProphetParams) == list(ProphetParams.model_fields)
    for bad in (
        {"early": -0.1},
        {"late": float("nan")},
        {"early_until": 1.1},
        {"span": 0},
        {"answer_start": -2},
        {"answer_width": 0},
        {"early_until": 0.7},
    ):
        with pytest.raises(ValidationError):
            ProphetParams(**bad)
    with pytest.raises(ValueError, match=r"needs View\.probabilities"):
        chosen(prophet(), make_view([C8]))
    assert prophet().needs == {"probabilities"}
    assert random_view(0).probabilities is None
