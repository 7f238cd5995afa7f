# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reference import procedures
from reference.views import (
    C8,
    CPU,
    assert_rows_independent,
    chosen,
    expected,
    make_view,
    random_view,
    select,
)

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import View, numeric_fields
from vllm_dlm.strategies.dream import Dream, DreamParams, schedule_time

ALGS = ("origin", "maskgit_plus", "topk_margin", "entropy")


def dream(alg: str = "maskgit_plus", width: int = 8, **more: float) -> Dream:
    return Dream(DreamParams(alg=alg, **more), width, CPU)


def at_step(step: int, steps: int, **more: torch.Tensor) -> View:
    """The worked block at a step of a schedule."""
    return make_view(
        [C8],
        step=torch.tensor([step]),
        steps=torch.tensor([steps]),
        uniform=torch.full((1, 8), 0.5),
        **more,
    )


def table(uniform: torch.Tensor):
    """Numbers [R, B] for the row-wise reference, which calls a row `forward`."""
    return lambda view: uniform[view.forward, : len(view.masked)]


# 7 masks. In 4 steps the first takes int(7 (1 - .75025)) = int(1.748), the second
# int(7 (1 - .5005 / .75025)) = int(2.330).
@pytest.mark.parametrize(
    ("step", "steps", "positions"),
    [
        (0, 4, [1]),
        (1, 4, [1, 5]),
        (3, 4, [1, 2, 3, 4, 5, 6, 7]),
        (9, 4, [1, 2, 3, 4, 5, 6, 7]),
        (0, 7, []),
        (0, 1, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_worked_block(step, steps, positions):
    decision = select(dream(), at_step(step, steps))
    assert decision.commit[0].nonzero()[:, 0].tolist() == positions
    assert decision.idle.tolist() == [not positions]


def test_scores():
    entropy = torch.tensor([[0.0, 0.3, 0.1, 0.2, 0.9, 0.1, 0.5, 0.4]])
    view = at_step(1, 4, entropy=entropy, margin=1 - entropy.flip(1))
    assert chosen(dream("entropy"), view) == [[2, 5]]
    assert chosen(dream("topk_margin"), view) == [[2, 7]]


def test_origin_takes_each_by_chance():
    uniform = torch.tensor([[0.0, 0.1, 0.2, 0.24, 0.25, 0.5, 0.9, 0.0]])
    view = make_view(
        [C8], step=torch.tensor([0]), steps=torch.tensor([4]), uniform=uniform
    )
    assert chosen(dream("origin"), view) == [[1, 2, 3, 7]]
    uniform.fill_(0.99)
    assert select(dream("origin"), view).idle.tolist() == [True]
    view.step.fill_(3)
    assert chosen(dream("origin"), view) == [[1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("masks", "steps", "counts"),
    [
        (8, 8, [0, 1, 1, 1, 1, 1, 1, 2]),
        (8, 4, [1, 2, 2, 3]),
        (16, 4, [3, 4, 4, 5]),
        (256, 256, [0, *[1] * 254, 2]),
    ],
)
def test_counts_of_a_whole_block(masks, steps, counts):
    left = torch.ones(1, masks, dtype=torch.bool)
    confidence = torch.linspace(0.1, 0.9, masks)[None]
    found = []
    for step in range(steps):
        view = make_view(
            confidence,
            left.clone(),
            step=torch.tensor([step]),
            steps=torch.tensor([steps]),
            uniform=torch.zeros(1, masks),
        )
        commit = select(dream(width=masks), view).commit
        found.append(int(commit.sum()))
        left &= ~commit
    assert found == counts


@given(
    steps=st.integers(1, 300),
    eps=st.floats(1e-6, 0.99) | st.sampled_from([1e-3, 0.5]),
)
def test_time_is_that_of_linspace_in_float32(steps, eps):
    step = torch.arange(steps + 1)
    got = schedule_time(
        step, torch.full_like(step, steps), torch.tensor(eps, dtype=torch.float32)
    )
    assert torch.equal(got, torch.linspace(1, eps, steps + 1))


@pytest.mark.parametrize("alg", ALGS)
@given(
    seed=st.integers(0, 2**20),
    ties=st.booleans(),
    alg_temp=st.just(0.0) | st.floats(0.05, 4.0),
    eps=st.sampled_from([1e-3, 0.25, 0.5]),
)
def test_agrees_with_the_row_wise_reference(alg, seed, ties, alg_temp, eps):
    view = random_view(seed, ties=ties)
    rule = procedures.dream(alg, eps, alg_temp, table(view.uniform))
    strategy = dream(alg, alg_temp=alg_temp, eps=eps)
    assert chosen(strategy, view) == expected(rule, view)


@pytest.mark.parametrize("alg", ALGS)
@given(seed=st.integers(0, 2**20), alg_temp=st.sampled_from([0.0, 0.5]))
def test_other_rows_do_not_matter(alg, seed, alg_temp):
    assert_rows_independent(dream(alg, alg_temp=alg_temp), random_view(seed), seed)


def test_each_row_has_its_own_temperature_and_end():
    uniform = torch.full((3, 8), 0.5)
    uniform[:, 6] = 1 - 2**-24
    view = make_view(
        [C8, C8, C8],
        step=torch.tensor([1, 1, 0]),
        steps=torch.tensor([4, 4, 4]),
        uniform=uniform,
    )
    params = {
        "alg_temp": torch.tensor([0.0, 1.0, 0.0]),
        "eps": torch.tensor([1e-3, 1e-3, 0.6]),  # 7 (1 - .9) is less than one token
    }
    commit = dream().select(view, params).commit
    assert [row.nonzero()[:, 0].tolist() for row in commit] == [[1, 5], [1, 6], []]


def test_drawn_positions_follow_the_softmax_of_their_scores():
    draws = 40_000
    confidence = torch.tensor([[0.9, 0.5, 0.2]]).expand(draws, 3)
    view = make_view(
        confidence,
        torch.ones(draws, 3, dtype=torch.bool),
        step=torch.zeros(draws, dtype=torch.int64),
        steps=torch.full((draws,), 2),  # int(3 (1 - .5005)) = 1
        uniform=torch.rand(draws, 3, generator=torch.Generator().manual_seed(0)),
    )
    found = select(dream(width=3, alg_temp=0.5), view).commit.float().mean(dim=0)
    wanted = (confidence[0] / 0.5).softmax(dim=0)
    torch.testing.assert_close(found, wanted, atol=0.01, rtol=0)


def test_a_uniform_of_zero_is_drawn_last_but_drawn():
    view = make_view(
        [[0.9] * 4],
        torch.tensor([[True, False, True, True]]),
        step=torch.tensor([1]),
        steps=torch.tensor([3]),  # int(3 (1 - .334 / .667)) = 1
        uniform=torch.tensor([[0.0, 0.5, 0.0, 0.0]]),
    )
    assert chosen(dream(width=4, alg_temp=1.0), view) == [[0]]


def test_a_row_without_masks_commits_nothing():
    view = at_step(3, 4)
    view.masked.fill_(False)
    assert chosen(dream(), view) == [[]]


@pytest.mark.parametrize(
    ("alg", "needs"),
    [
        ("origin", {"uniform"}),
        ("maskgit_plus", {"uniform"}),
        ("topk_margin", {"uniform", "margin"}),
        ("entropy", {"uniform", "entropy"}),
    ],
)
def test_asks_only_for_what_its_algorithm_reads(alg, needs):
    assert dream(alg).needs == needs <= Dream.needs


def test_registered_with_bounds():
    assert STRATEGIES["dream"] is Dream
    assert numeric_fields(DreamParams) == ["alg_temp", "eps"]
    assert DreamParams().model_dump() == {
        "alg": "entropy",
        "alg_temp": 0.0,
        "eps": 1e-3,
    }
    for bad in ({"alg": "topk"}, {"alg_temp": -0.1}, {"eps": 0.0}, {"eps": 1.0}):
        with pytest.raises(ValidationError):
            DreamParams(**bad)
    with pytest.raises(ValueError, match="needs View.entropy"):
        chosen(dream("entropy"), at_step(0, 4))
