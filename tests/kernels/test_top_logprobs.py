# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_dlm.kernels import numba_rows
from vllm_dlm.kernels.token_stats import token_stats
from vllm_dlm.kernels.top_logprobs import top_logprobs

INF = float("inf")
VERSIONS = pytest.mark.parametrize("with_numba", [True, False])


@pytest.fixture
def version(with_numba, monkeypatch):
    if not with_numba:
        monkeypatch.setattr(numba_rows, "AVAILABLE", False)


@VERSIONS
@given(
    seed=st.integers(0, 2**20),
    vocab=st.sampled_from([1, 2, 30, 2048, 5000]),
    k=st.integers(0, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    given_sum=st.booleans(),
)
def test_against_float64(odd_logits, with_numba, seed, vocab, k, dtype, given_sum):
    rows, k = 5, min(k, vocab)
    logits = odd_logits(seed, rows, vocab, dtype)
    tokens = torch.randint(
        0, vocab, (rows,), generator=torch.Generator().manual_seed(seed)
    )
    logsumexp = token_stats(logits).logsumexp if given_sum else None
    with pytest.MonkeyPatch.context() as patch:
        if not with_numba:
            patch.setattr(numba_rows, "AVAILABLE", False)
        ids, values, ranks = top_logprobs(logits, k, logsumexp, tokens)
    assert (ids.shape, ids.dtype) == ((rows, k + 1), torch.int64)
    assert values.dtype == torch.float32
    exact = logits.double()
    exact[exact.isnan()] = -INF
    for row in range(rows):
        assert ids[row, 0] == tokens[row]
        assert len(set(ids[row, 1:].tolist())) == k
        assert ranks[row] == (exact[row] >= exact[row, tokens[row]]).sum()
        best = exact[row].sort(descending=True, stable=True)
        found = exact[row][ids[row, 1:]]
        assert torch.equal(found, best.values[:k])
        if with_numba and dtype != torch.float16:
            assert torch.equal(ids[row, 1:], best.indices[:k])
        if exact[row].max().isfinite():
            want = exact[row].log_softmax(dim=0)[ids[row]]
            torch.testing.assert_close(values[row].double(), want, rtol=1e-6, atol=2e-6)
        else:
            assert (values[row] == -INF).all()


@VERSIONS
def test_ranks_as_vllm(version):
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, -INF]]).expand(5, 5)
    ids, values, ranks = top_logprobs(logits, 3, None, torch.arange(5))
    assert ranks.tolist() == [4, 2, 2, 3, 5]
    assert ids[0, 0] == 0
    assert set(ids[0, 1:3].tolist()) == {1, 2}
    assert ids[0, 3] == 3
    want = logits.log_softmax(dim=1)
    torch.testing.assert_close(values[:, 0], want.diagonal())


@VERSIONS
def test_no_rows_and_no_tokens_are_fine(version):
    ids, values, ranks = top_logprobs(
        torch.zeros(0, 4), 2, None, torch.zeros(0, dtype=torch.int64)
    )
    assert ids.shape == values.shape == (0, 3)
    assert ranks.shape == (0,)


def test_more_than_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="k=5 must be 0 to the vocabulary's size, 4"):
        top_logprobs(torch.zeros(1, 4), 5, None, torch.zeros(1, dtype=torch.int64))


def test_a_row_does_not_depend_on_the_others(odd_logits, monkeypatch):
    monkeypatch.setattr(numba_rows, "_WORTH_A_THREAD", 100)
    logits = odd_logits(1, 33, 2500)
    tokens = torch.arange(33)
    whole = top_logprobs(logits, 5, None, tokens)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        again = top_logprobs(logits.flip(0), 5, None, tokens.flip(0))
        for one, other in zip(whole, again, strict=True):
            assert torch.equal(one, other.flip(0))
