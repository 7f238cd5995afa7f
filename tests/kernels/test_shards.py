# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_dlm.kernels import numba_rows
from vllm_dlm.kernels.draw import draw
from vllm_dlm.kernels.shards import VocabShard, best_of
from vllm_dlm.kernels.token_stats import merged, prob_of, token_stats

INF, NAN = float("inf"), float("nan")


@st.composite
def cut_vocabularies(draw_from):
    """A vocabulary, where it is cut (1, 2, 3 or 7 pieces, some empty), the padding."""
    vocab = draw_from(st.sampled_from([1, 2, 7, 300, 5000]))
    pieces = draw_from(st.sampled_from([1, 2, 3, 7]))
    places = st.lists(st.integers(0, vocab), min_size=pieces - 1, max_size=pieces - 1)
    return vocab, sorted(draw_from(places)), draw_from(st.sampled_from([0, 5]))


@pytest.mark.parametrize("with_numba", [True, False])
@given(
    seed=st.integers(0, 2**20),
    cut=cut_vocabularies(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    ban=st.sampled_from(["none", "all", "some"]),
    ban_at=st.floats(0, 1),
)
def test_statistics_of_a_cut_vocabulary(
    odd_logits, oracle, assert_true, on_ranks, with_numba, seed, cut, dtype, ban, ban_at
):
    vocab, cuts, padding = cut
    rows = 6
    logits = odd_logits(seed, rows, vocab, dtype)
    generator = torch.Generator().manual_seed(seed)
    banned = torch.rand(rows, generator=generator) < 0.5 if ban == "some" else None
    ban_id = -1 if ban == "none" else round(ban_at * (vocab - 1))
    bans = [ban_id if banned is None or banned[row] else -1 for row in range(rows)]
    with pytest.MonkeyPatch.context() as patch:
        if not with_numba:
            patch.setattr(numba_rows, "AVAILABLE", False)
        results = on_ranks(
            cuts,
            padding,
            logits,
            lambda local, shard: token_stats(local, True, True, banned, ban_id, shard),
        )
    want = oracle(logits, bans)
    assert len(results) == len(cuts) + 1
    for stats in results:
        assert_true(stats, want)
        for one, other in zip(stats, results[0], strict=True):
            assert torch.equal(one, other)


def test_ties_go_to_the_lowest_id_of_all_ranks(on_ranks):
    logits = torch.zeros(2, 10)
    logits[0, [3, 4, 8]] = 2.0
    for cuts in ([], [4], [3, 4, 5], [1, 2, 3, 7, 8, 9]):
        for stats in on_ranks(
            cuts,
            0,
            logits,
            lambda local, shard: token_stats(local, need_margin=True, shard=shard),
        ):
            assert stats.argmax.tolist() == [3, 0]
            assert stats.margin.tolist() == [0, 0]


def test_shards_without_anything_to_predict(on_ranks):
    logits = torch.tensor(
        [
            [-INF, -INF, 1.0, 0.0],
            [NAN, NAN, 1.0, 0.0],
            [9.0, -INF, 1.0, 0.0],
            [9.0, -INF, -INF, NAN],
            [0.0, 1.0, 0.0, INF],
        ]
    )
    for cuts in ([], [1], [2], [1, 2, 3], [0, 1, 1]):
        for stats in on_ranks(
            cuts,
            3,
            logits,
            lambda local, shard: token_stats(local, True, ban_id=0, shard=shard),
        ):
            assert stats.argmax.tolist() == [2, 2, 2, 1, 3]
            sure = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]) / (
                1 + torch.tensor(-1.0).exp()
            )
            torch.testing.assert_close(stats.confidence, sure)
            assert stats.entropy[3:].tolist() == [0, 0]


@given(seed=st.integers(0, 2**20), cut=cut_vocabularies())
def test_probability_of_a_token_of_any_rank(odd_logits, on_ranks, seed, cut):
    vocab, cuts, padding = cut
    logits = odd_logits(seed, 6, vocab)
    tokens = torch.randint(
        0, vocab, (6,), generator=torch.Generator().manual_seed(seed)
    )
    logsumexp = token_stats(logits).logsumexp
    want = prob_of(logits, tokens, logsumexp)
    for got in on_ranks(
        cuts,
        padding,
        logits,
        lambda local, shard: prob_of(local, tokens, logsumexp, shard),
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("with_numba", [True, False])
@given(seed=st.integers(0, 2**20), cut=cut_vocabularies())
def test_draws_from_a_cut_vocabulary(odd_logits, on_ranks, with_numba, seed, cut):
    vocab, cuts, padding = cut
    rows = 8
    logits = odd_logits(seed, rows, vocab)
    ban_id = vocab // 3 if vocab > 1 else -1
    settings = {
        "temperature": torch.tensor([1.0, 0.3, 0.0, 2.0]).repeat(2),
        "top_k": torch.zeros(rows, dtype=torch.int64),
        "top_p": torch.ones(rows),
        "min_p": torch.tensor([0.0, 0.05]).repeat_interleave(4),
        "seed": torch.full((rows,), seed),
        "position": torch.arange(rows),
        "step": torch.zeros(rows, dtype=torch.int64),
        "ban_id": ban_id,
    }
    argmax = token_stats(logits, ban_id=ban_id).argmax
    with pytest.MonkeyPatch.context() as patch:
        if not with_numba:
            patch.setattr(numba_rows, "AVAILABLE", False)
        want = draw(logits, argmax, **settings)
        for got in on_ranks(
            cuts,
            padding,
            logits,
            lambda local, shard: draw(local, argmax, **settings, shard=shard),
        ):
            assert torch.equal(got, want)


def test_merging_does_not_depend_on_the_number_of_rows():
    parts = torch.rand(7, 50, 5, dtype=torch.float64).exp()
    whole = merged(parts)
    for row in range(50):
        assert torch.equal(merged(parts[:, row : row + 1])[0], whole[row])


def test_the_best_of_pieces():
    scores = torch.tensor([[1.0, -INF], [2.0, -INF], [2.0, -INF]])
    tokens = torch.tensor([[1, 5], [9, 6], [4, 7]])
    assert best_of(scores, tokens).tolist() == [4, 5]


def test_shards_that_cannot_be():
    with pytest.raises(ValueError, match="first=-1, size=4"):
        VocabShard(-1, 4, torch.clone)
    shard = VocabShard(0, 4, torch.clone)
    with pytest.raises(ValueError, match="size=4 tokens, its logits only 3 columns"):
        token_stats(torch.zeros(1, 3), shard=shard)
    one = torch.ones(1)
    with pytest.raises(ValueError, match="whole vocabulary"):
        draw(
            torch.zeros(1, 4), argmax=one.long(), temperature=one, top_k=one.long(),
            top_p=one, min_p=one * 0, seed=one.long(), position=one.long(),
            step=one.long(), shard=shard,
        )  # fmt: skip
