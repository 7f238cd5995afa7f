# SPDX-License-Identifier: Apache-2.0
"""What sets it apart from `dream`; what it measures is tested on a real engine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.views import CPU, chosen, random_view

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.diffucoder import DiffuCoder
from vllm_dlm.strategies.dream import Dream, DreamParams


@pytest.mark.parametrize("alg", ["entropy", "maskgit_plus", "topk_margin", "origin"])
@given(seed=st.integers(0, 2**20))
def test_of_the_same_statistics_it_decides_as_dream(alg, seed):
    params, view = DreamParams(alg=alg), random_view(seed)
    assert chosen(DiffuCoder(params, 8, CPU), view) == chosen(
        Dream(params, 8, CPU), view
    )


def test_measures_what_is_drawn_from():
    assert STRATEGIES["diffucoder"] is DiffuCoder
    assert (DiffuCoder.measures, Dream.measures) == ("drawn", "model")
    assert DiffuCoder.Params().alg == "entropy"


def test_of_equally_certain_tokens_the_leftmost_come_first():
    view = random_view(0, rows=1)
    view.masked.fill_(True)
    view.entropy.fill_(0.0)
    view.step.fill_(1)
    view.steps.fill_(4)
    strategy = DiffuCoder(DreamParams(), 8, CPU)
    assert chosen(strategy, view) == [[0, 1]]
