# SPDX-License-Identifier: Apache-2.0
import math
import re
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_dlm.kernels import numba_rows
from vllm_dlm.kernels import token_stats as module
from vllm_dlm.kernels.token_stats import (
    TokenStats,
    prob_of,
    token_stats,
    token_stats_reference,
)

INF, NAN = float("inf"), float("nan")


def in_slices(logits: torch.Tensor, *args, **kwargs) -> TokenStats:
    """`token_stats` as without numba, in slices of two rows or so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba_rows, "AVAILABLE", False)
        patch.setattr(module, "_SLICE_CPU", 2 * logits.shape[1] + 1)
        return token_stats(logits, *args, **kwargs)


VERSIONS = pytest.mark.parametrize(
    "stats", [token_stats, token_stats_reference, in_slices]
)


def assert_same(got: TokenStats, want: TokenStats) -> None:
    for name in TokenStats._fields:
        one, other = getattr(got, name), getattr(want, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype, name
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6, msg=name)


def random_logits(seed: int, rows: int, vocab: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(rows, 1, generator=generator) * 20
    return (torch.randn(rows, vocab, generator=generator) * scale).to(dtype)


def most_allocated(function) -> int:
    """Bytes that numpy and Python had at most, and torch's largest tensor."""
    tracemalloc.start()
    function()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert sizes, "the profiler saw no tensor"
    return peak + max(sizes)


@VERSIONS
def test_against_float64(stats):
    logits = random_logits(0, 40, 3001)
    got = stats(logits, True, True)
    p = logits.double().softmax(dim=1)
    top = p.topk(2, dim=1).values
    assert torch.equal(got.argmax, logits.argmax(dim=1))
    assert got.argmax.dtype == torch.int64
    for found, exact in (
        (got.confidence, top[:, 0]),
        (got.logprob, top[:, 0].log()),
        (got.margin, top[:, 0] - top[:, 1]),
        (got.entropy, torch.special.entr(p).sum(dim=1)),
        (got.logsumexp, logits.double().logsumexp(dim=1)),
    ):
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


@VERSIONS
@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 5),
    vocab=st.sampled_from([1, 2, 7, 128, 2047, 2048, 2049, 5000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    ban=st.sampled_from(["none", "all", "some"]),
    ban_at=st.floats(0, 1),
)
def test_odd_rows(
    stats, odd_logits, oracle, assert_true, seed, rows, vocab, dtype, ban, ban_at
):
    logits = odd_logits(seed, rows, vocab, dtype)
    generator = torch.Generator().manual_seed(seed)
    banned = torch.rand(rows, generator=generator) < 0.5 if ban == "some" else None
    ban_id = -1 if ban == "none" else round(ban_at * (vocab - 1))
    bans = [ban_id if banned is None or banned[row] else -1 for row in range(rows)]
    before = logits.clone()
    got = stats(logits, True, True, banned, ban_id)
    assert_true(got, oracle(logits, bans))
    assert torch.equal(logits.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))


@VERSIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lowest_id(stats, dtype):
    logits = torch.zeros(3, 2500, dtype=dtype)
    logits[0, [1500, 700, 2400]] = 3.0
    logits[1] = -3.0
    logits[2, :5] = -0.0
    assert stats(logits).argmax.tolist() == [700, 0, 0]
    assert stats(logits, ban_id=0).argmax.tolist() == [700, 1, 1]
    assert stats(logits, need_margin=True).margin[0] == 0


@VERSIONS
def test_a_banned_token_has_no_mass(stats):
    logits = torch.tensor([[9.0, 1.0, 0.0], [9.0, 1.0, 0.0]])
    banned = torch.tensor([True, False])
    got = stats(logits, True, True, banned, 0)
    assert got.argmax.tolist() == [1, 0]
    p = 1 / (1 + math.exp(-1))
    assert got.confidence[0].item() == pytest.approx(p)
    assert got.margin[0].item() == pytest.approx(2 * p - 1)
    assert got.confidence[1] > 0.999
    everywhere = stats(logits, ban_id=0)
    assert everywhere.argmax.tolist() == [1, 1]
    assert logits[0, 0] == 9.0  # not changed in place


@VERSIONS
def test_hopeless_rows_have_confidence_zero_and_no_nan(stats):
    logits = torch.tensor(
        [[NAN, NAN, NAN], [-INF, -INF, -INF], [0.0, INF, 1.0], [NAN, 0.0, NAN]]
    )
    got = stats(logits, True, True, ban_id=0)
    assert got.argmax.tolist() == [1, 1, 1, 1]
    assert got.confidence.tolist() == [0, 0, 0, 1]
    assert got.logprob.tolist() == [-INF, -INF, -INF, 0]
    assert got.entropy.tolist() == [0, 0, 0, 0]
    assert got.margin.tolist() == [0, 0, 0, 1]
    chosen = prob_of(logits, torch.tensor([1, 0, 1, 2]), got.logsumexp)
    assert chosen.tolist() == [0, 0, 0, 0]


@VERSIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signs_of_zero_and_nan(stats, oracle, assert_true, dtype):
    negative = -1 - torch.arange(2500.0) % 7
    logits = negative.repeat(5, 1).to(dtype)
    logits[1:4, ::3], logits[1:4, 1::3] = NAN, NAN
    logits[2, 2499] = -0.0
    logits[3, [700, 2400]] = torch.tensor([-0.0, 0.0], dtype=dtype)
    logits[4] = NAN
    bits = logits.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[1:4, 1::3] |= torch.iinfo(bits.dtype).min
    bits[4] |= torch.iinfo(bits.dtype).min
    # torch's own conversions drop the sign of a NaN.
    assert (logits[4].isnan() & logits[4].signbit()).all()
    banned = torch.tensor([False, False, True, True, True])
    got = stats(logits, True, True, banned, 2)
    assert_true(got, oracle(logits, [2 if ban else -1 for ban in banned]))


@VERSIONS
def test_extreme_but_finite_logits(stats):
    logits = torch.tensor([[3e38, -3e38, 0.0], [1e-40, 0.0, -1e-40]])
    got = stats(logits, True, True)
    assert got.argmax.tolist() == [0, 0]
    assert got.confidence.tolist() == pytest.approx([1, 1 / 3])
    assert got.entropy.tolist() == pytest.approx([0, math.log(3)])
    assert got.margin.tolist() == pytest.approx([1, 0], abs=1e-6)


@VERSIONS
def test_nothing_is_computed_unasked_and_no_rows_are_fine(stats):
    got = stats(torch.zeros(2, 4))
    assert got.entropy is None
    assert got.margin is None
    none = stats(torch.zeros(0, 4), True, True)
    assert [len(column) for column in none] == [0] * 6


@pytest.mark.parametrize(
    ("name", "dtype", "instruction"),
    [
        ("_sums", torch.bfloat16, r"vfmadd\d+ps\s.*%zmm"),
        ("_sums", torch.float32, r"vfmadd\d+ps\s.*%zmm"),
        ("_largest", torch.bfloat16, r"vpmaxsw\s.*%zmm"),
        ("_largest", torch.float32, r"vpmaxsd\s.*%zmm"),
    ],
)
def test_loops_use_the_full_width_of_avx512(name, dtype, instruction):
    numba, llvm = pytest.importorskip("numba"), pytest.importorskip("llvmlite.binding")
    if not llvm.get_host_cpu_features().get("avx512bw"):
        pytest.skip("this CPU has no AVX-512")
    # Compiled afresh: numba has no assembly of what is in its cache.
    loop = numba.njit(error_model="numpy", fastmath={"contract", "reassoc"})(
        getattr(numba_rows, name).py_func
    )
    bits, _, short = numba_rows._bits(torch.zeros(1, 64, dtype=dtype))
    loop(bits, short, *([np.float32(0)] if name == "_sums" else []))
    (assembly,) = loop.inspect_asm().values()
    assert re.search(instruction, assembly)
    assert not re.search(r"vpsllvq|vpmovqd", assembly), "64-bit integers"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(dtype, monkeypatch):
    monkeypatch.setattr(numba_rows, "_WORTH_A_THREAD", 100)
    logits = random_logits(1, 33, 2500, dtype)
    whole = token_stats(logits, True, True, ban_id=3)
    for threads in (1, 3, torch.get_num_threads()):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        again = token_stats(logits.flip(0), True, True, ban_id=3)
        for one, other in zip(whole, again, strict=True):
            assert torch.equal(one, other.flip(0))
    for row in range(3):
        alone = token_stats(logits[row : row + 1], True, True, ban_id=3)
        for one, other in zip(whole, alone, strict=True):
            assert torch.equal(one[row], other[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_need_no_copy_to_be_right(dtype):
    padded = random_logits(2, 6, 640, dtype)
    one_row = padded[:1].expand(5, 640)
    views = (padded[:, :600], padded[::2], padded[1:, 40:], padded.T, one_row)
    for view in views:
        assert_same(
            token_stats(view, True, True), token_stats_reference(view, True, True)
        )


def test_threads_use_cpus_that_openmp_has_not_bound(monkeypatch):
    os = numba_rows.os
    before = os.sched_getaffinity(0)
    numba_rows._cpus.cache_clear()
    try:
        os.sched_setaffinity(0, {min(before)})
        monkeypatch.setattr(numba_rows, "_WORTH_A_THREAD", 100)
        logits = random_logits(1, 8, 2500)
        assert_same(token_stats(logits), token_stats_reference(logits))
        assert os.sched_getaffinity(0) == {min(before)}
    finally:
        os.sched_setaffinity(0, before)
        numba_rows._cpus.cache_clear()


@given(seed=st.integers(0, 2**20))
def test_probability_of_other_tokens(seed):
    logits = random_logits(seed, 6, 50)
    stats = token_stats(logits)
    tokens = torch.arange(6) * 8
    exact = logits.double().softmax(dim=1)[torch.arange(6), tokens]
    got = prob_of(logits, tokens, stats.logsumexp)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-37)
    best = prob_of(logits, stats.argmax, stats.logsumexp)
    torch.testing.assert_close(best, stats.confidence, rtol=3e-7, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [32_000, 126_464])
def test_memory_does_not_grow_with_the_logits(dtype, vocab):
    rows = 256 if vocab == 32_000 else 64
    whole = random_logits(3, rows, vocab).to(dtype)
    for logits in (whole, whole[::2], whole[:, : vocab - 3]):
        token_stats(logits, True, True, ban_id=1)  # compiled, imported
        used = most_allocated(
            lambda logits=logits: token_stats(logits, True, True, ban_id=1)
        )
        if numba_rows.reads(logits):
            assert used < 600 * rows
        else:  # float16: slices of it as float32
            assert used < 3 * 4 * module._SLICE_CPU


def test_a_ban_id_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="ban_id=4 is no token of a vocabulary of 4"):
        token_stats(torch.zeros(2, 4), ban_id=4)
