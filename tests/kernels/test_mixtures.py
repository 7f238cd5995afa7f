# SPDX-License-Identifier: Apache-2.0
"""Mixtures of embeddings by rows of logits: worked ones, and over a cut vocabulary."""

from __future__ import annotations

import pytest
import torch

from vllm_dlm.kernels import token_stats
from vllm_dlm.kernels.mixtures import mixtures


class Embeddings:
    """Of tokens, or of one rank's part of them, which the ranks would sum up."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def mixed(self, probabilities: torch.Tensor) -> torch.Tensor:
        return probabilities @ self.weight


THREE = Embeddings(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))


def test_worked_mixture():
    """A mask of which iteration smoothing's first step thinks (.5, .3, .2)."""
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    fed = torch.tensor([[0.1, 0.1]]) + 0.15 * mixtures(logits, THREE)
    assert fed[0].tolist() == pytest.approx([0.205, 0.175])


def test_broken_logits_are_no_numbers():
    logits = torch.tensor([[torch.nan, 1.0, 0.0], [-torch.inf] * 3, [0.0, 1.0, 0.0]])
    stats = token_stats.token_stats(logits)
    for known in (None, stats.logsumexp):
        found = mixtures(logits, THREE, None, known).isfinite().all(dim=1)
        assert found.tolist() == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [[], [4], [0, 3, 3, 9]])
@pytest.mark.parametrize("is_known", [False, True])
def test_a_cut_vocabulary(on_ranks, monkeypatch, dtype, cuts, is_known):
    """Slices of rows and ranks, padding columns and empty ranks included."""
    monkeypatch.setattr(token_stats, "_SLICE_CPU", 20)
    draw = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(7, 10, generator=draw)).to(dtype)
    weight = torch.randn(10, 6, generator=draw).to(dtype)
    wanted = logits.double().softmax(dim=1) @ weight.double()
    known = token_stats.token_stats(logits).logsumexp if is_known else None

    def part(local, shard):
        own = weight[shard.first : shard.first + shard.size]
        return mixtures(local, Embeddings(own), shard, known).double()

    close = {"rtol": 1e-5, "atol": 1e-5}
    if dtype == torch.bfloat16:
        close = {"rtol": 3e-2, "atol": 3e-2}
    whole = mixtures(logits, Embeddings(weight), None, known)
    assert whole.dtype == dtype
    torch.testing.assert_close(whole.double(), wanted, **close)
    ranks = sum(on_ranks(cuts, 2, logits, part))
    torch.testing.assert_close(ranks, wanted, **close)
