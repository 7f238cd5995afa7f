# SPDX-License-Identifier: Apache-2.0
"""End-of-text prediction: where the canvas is cut, whatever the strategy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.views import C8, make_view, random_view

from vllm_dlm.config.cache import FAR
from vllm_dlm.model_executor.sampling.eotp import MODES, canvas_cut, end_of_text
from vllm_dlm.strategies.base import View


def slow_end_of_text(
    view: View, write: torch.Tensor, is_end: torch.Tensor, threshold: float
) -> list[int]:
    found = []
    for row in range(write.shape[0]):
        end = -1
        for i in reversed(range(write.shape[1])):
            sure = view.confidence[row, i] >= torch.tensor(threshold)
            if view.masked[row, i] and not write[row, i] and sure:
                end = i if view.is_eos[row, i] else end
        written = [i for i in range(write.shape[1]) if write[row, i] and is_end[row, i]]
        found.append(written[0] if written else end)
    return found


def at(*positions: int) -> torch.Tensor:
    flags = torch.zeros(1, 8, dtype=torch.bool)
    flags[0, list(positions)] = True
    return flags


def end(
    view: View, write: torch.Tensor, is_end: torch.Tensor, threshold: float = 0.9
) -> list[int]:
    rows = len(view.masked)
    found = end_of_text(view, write, is_end, torch.full((rows,), threshold))
    assert found.dtype == torch.int64
    return found.tolist()


@pytest.mark.parametrize(
    ("eos", "write", "cut"),
    [
        ((), (1, 5), -1),
        ((1, 5), (1, 5), 1),  # both are written: the first
        ((2, 5), (1, 5), 5),  # 5 is written; 2 is only predicted
        ((5, 6), (1,), 5),  # predicted at 0.93
        ((2, 6), (1,), -1),  # predicted, but unsure
        ((0,), (1,), -1),  # decided already
    ],
)
def test_worked_block(eos, write, cut):
    view = make_view([C8], is_eos=at(*eos))
    assert end(view, at(*write), view.is_eos) == [cut]


def test_the_first_sure_prediction_counts_not_the_surest():
    view = make_view([C8], is_eos=at(2, 5))
    assert end(view, at(1), view.is_eos, 0.7) == [2]


def test_what_is_written_counts_not_the_candidate():
    view = make_view([C8], is_eos=at(1))
    assert end(view, at(1, 3), at(3)) == [3]
    assert end(view, at(1), at()) == [-1]


def test_an_edited_token_may_end_the_text():
    assert end(make_view([C8]), at(0), at(0)) == [0]


@given(seed=st.integers(0, 2**20), ties=st.booleans(), threshold=st.floats(0, 1))
def test_agrees_with_a_slow_loop(seed, ties, threshold):
    view = random_view(seed, ties=ties)
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(2, *view.masked.shape, generator=generator)
    write, is_end = view.masked & (draw[0] < 0.3), view.valid & (draw[1] < 0.2)
    wanted = slow_end_of_text(view, write, is_end, threshold)
    assert end(view, write, is_end, threshold) == wanted


@pytest.mark.parametrize(
    ("mode", "rewrites", "own", "cut"),
    [
        ("off", False, -1, -1),
        ("block", False, -1, 7),
        ("canvas", False, -1, 7),
        ("token", False, -1, 3),
        ("token", True, -1, 7),  # the end may yet be edited away
        ("off", False, 5, 5),
        ("block", False, 5, 5),  # the cut further left
        ("canvas", False, 5, 5),
        ("token", False, 5, 3),
    ],
)
def test_what_is_cut_after_an_end_at_3(mode, rewrites, own, cut):
    found = canvas_cut(
        torch.tensor([3]),
        torch.tensor([19]),  # an end ahead says nothing then
        torch.tensor([MODES.index(mode)]),
        torch.tensor([rewrites]),
        torch.tensor([8]),
        torch.tensor([own]),
    )
    assert found.tolist() == [cut]


@pytest.mark.parametrize(
    ("ahead", "own", "cut"),
    [(8, -1, 15), (15, -1, 15), (16, -1, 23), (8, 3, 3), (8, 20, 15)],
)
def test_an_end_ahead_cuts_behind_its_block(ahead, own, cut):
    found = canvas_cut(
        torch.full((len(MODES),), -1),
        torch.full((len(MODES),), ahead),
        torch.arange(len(MODES)),
        torch.zeros(len(MODES), dtype=torch.bool),
        torch.full((len(MODES),), 8),
        torch.full((len(MODES),), own),
    )
    canvas = MODES.index("canvas")
    assert found.tolist() == [cut if mode == canvas else own for mode in range(4)]


def test_rows_differ_and_without_an_end_nothing_is_cut():
    found = canvas_cut(
        torch.tensor([-1, -1, 2, 2, 2, 2]),
        torch.full((6,), FAR),
        torch.tensor([MODES.index(m) for m in ("block", "token", *MODES)]),
        torch.zeros(6, dtype=torch.bool),
        torch.tensor([8, 8, 8, 4, 8, 8]),
        None,
    )
    assert found.tolist() == [-1, -1, -1, 3, 2, 7]
