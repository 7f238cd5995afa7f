# SPDX-License-Identifier: Apache-2.0
import math
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_dlm.kernels import draw as module
from vllm_dlm.kernels import numba_rows
from vllm_dlm.kernels.draw import draw, random_tokens, uniform
from vllm_dlm.kernels.token_stats import token_stats

MASK64 = (1 << 64) - 1
INF, NAN = float("inf"), float("nan")


def mix(bits: int) -> int:
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK64
    return bits ^ (bits >> 31)


def row_key(seed: int, position: int, step: int) -> int:
    golden = 0x9E3779B97F4A7C15
    key = mix((mix(seed & MASK64) + (position + 1) * golden) & MASK64)
    return mix((key + (step + 1) * golden) & MASK64)


def slow_draw(logits, temperature, top_k, top_p, min_p, seed, position, step) -> int:
    """One row by plain Python, in double precision."""
    vocab = len(logits)
    order = sorted(range(vocab), key=lambda i: (-logits[i], i))
    if temperature == 0:
        return order[0]
    scores = [(x - logits[order[0]]) / temperature for x in logits]
    kept = [i for i in order if math.exp(scores[i]) >= min_p]
    if 0 < top_k < vocab:
        edge = scores[order[top_k - 1]]
        kept = [i for i in kept if scores[i] >= edge]
    if top_p < 1:
        total, before, nucleus = sum(math.exp(scores[i]) for i in kept), 0.0, []
        for i in kept:
            if before / total < top_p or not nucleus:
                nucleus.append(i)
            before += math.exp(scores[i])
        kept = nucleus

    def noisy(token: int) -> float:
        key = row_key(seed, position, step)
        bits = mix((key + (token + 1) * 0x9E3779B97F4A7C15) & MASK64)
        v = min(((bits >> 11) + 0.5) * 2.0**-53, 1 - 2.0**-24)
        return scores[token] - math.log(-math.log1p(-v))

    return max(kept, key=noisy)


def settings(rows: int, **given_values) -> dict[str, torch.Tensor]:
    values = {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
        "seed": 0, "position": 0, "step": 0,
    } | given_values  # fmt: skip
    out = {}
    for name, value in values.items():
        ints = name in ("top_k", "seed", "position", "step")
        tensor = torch.as_tensor(value, dtype=torch.int64 if ints else torch.float32)
        out[name] = tensor.expand(rows).clone()
    return out


def p_value(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the chi-square test that the counts come from the expected ones."""
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor(observed.numel() - 1.0)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


WITH_NUMBA = pytest.mark.parametrize("with_numba", [True, False])


# --- What is drawn --------------------------------------------------------------


@WITH_NUMBA
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    data_seed=st.integers(0, 2**20),
    position=st.integers(0, 2**20),
    step=st.integers(0, 2**10),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([-1, 0, 1, 3, 100]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_agrees_with_plain_python(
    with_numba, seed, data_seed, position, step, temperature, top_k, top_p, min_p
):
    generator = torch.Generator().manual_seed(data_seed)
    logits = torch.randn(1, 40, generator=generator) * 2
    options = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "seed": seed, "position": position, "step": step,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        if not with_numba:
            patch.setattr(numba_rows, "AVAILABLE", False)
        got = draw(logits, logits.argmax(dim=1), **settings(1, **options))
    assert got.dtype == torch.int64
    assert got.tolist() == [slow_draw(logits[0].tolist(), **options)]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.75}, [0, 1]),
        ({"top_p": 0.85}, [0, 1, 2]),
        ({"min_p": 0.26}, [0, 1]),
        ({"top_k": 3, "top_p": 0.85}, [0, 1]),
    ],
)
def test_frequencies(options, kept):
    probability = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04])
    count = 20_000
    logits = probability.log().expand(count, 5)
    options = settings(count, position=torch.arange(count), **options)
    tokens = draw(logits, logits.argmax(dim=1), **options)
    observed = tokens.bincount(minlength=5).double()
    target = torch.zeros(5, dtype=torch.float64)
    target[kept] = probability[kept].double() ** (1 / float(options["temperature"][0]))
    target *= count / target.sum()
    assert observed[target == 0].sum() == 0
    assert p_value(observed[kept], target[kept]) > 1e-3


def test_ties_at_the_edge_of_top_k_all_stay():
    count = 2000
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]]).expand(count, 5)
    options = settings(count, position=torch.arange(count), top_k=2)
    tokens = draw(logits, logits.argmax(dim=1), **options)
    assert tokens.unique().tolist() == [0, 1, 2, 3]


def test_greedy_and_hopeless_rows_keep_the_argmax():
    logits = torch.tensor([[0.0, 1.0], [NAN, NAN], [0.0, INF], [0.0, NAN]])
    argmax = torch.tensor([1, 1, 1, 0])
    options = settings(4, temperature=torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert draw(logits, argmax, **options).tolist() == [1, 1, 1, 0]


def test_the_banned_token_is_never_drawn():
    count = 400
    logits = torch.tensor([[0.0, 9.0, 0.0]]).expand(count, 3)
    options = settings(count, position=torch.arange(count))
    argmax = torch.zeros(count, dtype=torch.int64)
    everywhere = draw(logits, argmax, **options, ban_id=1)
    assert everywhere.unique().tolist() == [0, 2]
    banned = torch.arange(count) < 200
    some = draw(logits, argmax, **options, ban_id=1, banned=banned)
    assert torch.equal(some[:200], everywhere[:200])
    assert (some[200:] == 1).sum() > 150


def test_a_tiny_temperature_is_the_argmax():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    argmax = logits.argmax(dim=1)
    options = settings(50, temperature=1e-6, position=torch.arange(50))
    assert torch.equal(draw(logits, argmax, **options), argmax)


@WITH_NUMBA
@given(
    seed=st.integers(0, 2**20),
    vocab=st.sampled_from([1, 2, 30, 2049]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    banned=st.booleans(),
)
def test_odd_rows(odd_logits, with_numba, seed, vocab, dtype, banned):
    rows = 4
    logits = odd_logits(seed, rows, vocab, dtype)
    ban_id = seed % vocab if banned else -1
    options = settings(
        rows,
        seed=seed,
        position=torch.arange(rows),
        temperature=torch.tensor([0.5, 1.5]).repeat(2),
        min_p=torch.tensor([0.0, 0.2]).repeat_interleave(2),
    )
    argmax = token_stats(logits, ban_id=ban_id).argmax
    with pytest.MonkeyPatch.context() as patch:
        if not with_numba:
            patch.setattr(numba_rows, "AVAILABLE", False)
        got = draw(logits, argmax, **options, ban_id=ban_id)
    for row, scores in enumerate(logits.tolist()):
        scores = [
            -INF if x != x or token == ban_id else x for token, x in enumerate(scores)
        ]
        if not math.isfinite(max(scores)):
            assert got[row] == argmax[row]
            continue
        numbers = {name: values[row].item() for name, values in options.items()}
        assert got[row] == slow_draw(scores, **numbers)


def test_numba_and_torch_draw_the_same_tokens(monkeypatch):
    rows, vocab = 1000, 2500
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(5)) * 2
    argmax = logits.argmax(dim=1)
    options = settings(rows, position=torch.arange(rows), temperature=0.9)
    fast = draw(logits, argmax, **options)
    monkeypatch.setattr(numba_rows, "AVAILABLE", False)
    assert torch.equal(fast, draw(logits, argmax, **options))
    assert (fast != argmax).sum() > rows / 2


# --- What it does not depend on -------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_and_row_order_do_not_matter(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    rows, vocab = 64, 300
    logits = torch.randn(rows, vocab, generator=generator).to(dtype)

    def one_of(*values: float) -> torch.Tensor:
        pick = torch.randint(0, len(values), (rows,), generator=generator)
        return torch.tensor(values)[pick]

    options = settings(
        rows,
        temperature=one_of(0.0, 0.7, 1.5),
        top_k=one_of(0, 5, 50),
        top_p=one_of(1.0, 0.8),
        min_p=one_of(0.0, 0.02),
        seed=one_of(1, 2),
        position=torch.arange(rows),
        step=one_of(0, 1, 2),
    )
    argmax = logits.float().argmax(dim=1)
    whole = draw(logits, argmax, **options)
    monkeypatch.setattr(module, "_SLICE_CPU", 5 * vocab)
    order = torch.randperm(rows, generator=generator)
    shuffled = draw(
        logits[order], argmax[order], **{k: v[order] for k, v in options.items()}
    )
    assert torch.equal(shuffled, whole[order])
    for row in range(0, rows, 7):
        part = slice(row, row + 1)
        alone = draw(
            logits[part], argmax[part], **{k: v[part] for k, v in options.items()}
        )
        assert alone[0] == whole[row]
    monkeypatch.setattr(numba_rows, "_WORTH_A_THREAD", 100)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        assert torch.equal(draw(logits, argmax, **options), whole)
    hot = options["temperature"] > 0
    cut = (options["top_k"] > 0) | (options["top_p"] < 1)
    for plain in (hot & ~cut, hot):
        told = draw(
            logits,
            argmax,
            **options,
            rows=plain.nonzero()[:, 0],
            truncated_rows=(hot & cut).nonzero()[:, 0],
        )
        assert torch.equal(told, whole)


# --- The noise ------------------------------------------------------------------


def test_numba_makes_the_same_noise():
    ids = torch.arange(3000)
    for seed in (0, -1, 2**40):
        key = module.row_key(torch.tensor([seed]), torch.tensor(3), torch.tensor(7))
        out = torch.empty(2900)
        numba_rows._exponentials(key.numpy().view("uint64")[0], 100, out.numpy())
        want = module.token_noise(key, ids)[0, 100:]
        torch.testing.assert_close(-out.log(), want, rtol=4e-7, atol=4e-7)


def test_numba_keeps_no_noise():
    rows, vocab = 64, 32_000
    logits = torch.randn(rows, vocab).bfloat16()
    options = settings(rows, position=torch.arange(rows))
    both = {"rows": torch.arange(rows), "truncated_rows": torch.arange(0)}
    argmax = token_stats(logits).argmax
    draw(logits, argmax, **options, **both)  # compiled, imported
    with torch.profiler.profile(profile_memory=True) as profile:
        draw(logits, argmax, **options, **both)
    events = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert 0 < max(sizes) <= 8 * rows
    tracemalloc.start()
    draw(logits, argmax, **options, **both)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 600 * rows


def test_uniform_is_the_documented_hash():
    seeds = [0, 1, -1, 2**62, -(2**63)]
    got = uniform(torch.tensor(seeds), torch.tensor(7), torch.tensor(3))
    want = [(mix(row_key(seed, 7, 3)) >> 40) * 2.0**-24 for seed in seeds]
    assert got.dtype == torch.float32
    assert got.tolist() == want


@pytest.mark.parametrize("axis", ["seed", "position", "step"])
def test_uniform_along_each_axis(axis):
    count = 200_000
    keys = {name: torch.tensor(5) for name in ("seed", "position", "step")}
    keys[axis] = torch.arange(count)
    values = uniform(**keys)
    assert values.min() >= 0
    assert values.max() < 1
    level = torch.full((100,), count / 100, dtype=torch.float64)
    assert p_value((values * 100).long().bincount(minlength=100), level) > 1e-3
    # Neighbours are independent: pairs fill a 10 x 10 grid evenly.
    pairs = (values[:-1] * 10).long() * 10 + (values[1:] * 10).long()
    expected = torch.full((100,), (count - 1) / 100, dtype=torch.float64)
    assert p_value(pairs.bincount(minlength=100).double(), expected) > 1e-3


def test_draws_of_neighbours_and_the_uniform_numbers_are_independent():
    count, vocab = 40_000, 5
    logits = torch.zeros(count, vocab)
    argmax = torch.zeros(count, dtype=torch.int64)

    def tokens(**keys) -> torch.Tensor:
        return draw(logits, argmax, **settings(count, **keys))

    places = torch.arange(count)
    base = tokens(position=places)
    level = torch.full((25,), count / 25, dtype=torch.float64)
    others = {
        "next step": tokens(position=places, step=1),
        "next seed": tokens(position=places, seed=1),
        "next position": tokens(position=places + 1),
        "step for position": tokens(step=places),
        "uniform": (
            uniform(torch.tensor(0), places, torch.tensor(0)).mul(vocab).long()
        ),
    }
    for name, other in others.items():
        counts = (base * vocab + other).bincount(minlength=25).double()
        assert p_value(counts, level) > 1e-3, name


def test_the_noise_is_gumbel_into_both_tails():
    keys = module.row_key(torch.arange(500), torch.tensor(0), torch.tensor(0))
    noise = module.token_noise(keys, torch.arange(2000)).flatten().double()
    assert noise.isfinite().all()
    edges = torch.linspace(-2, 9, 40, dtype=torch.float64)
    below = torch.exp(-torch.exp(-edges))  # Gumbel's distribution function
    share = below.diff(prepend=torch.zeros(1), append=torch.ones(1))
    cells = torch.bucketize(noise, edges).bincount(minlength=41).double()
    assert p_value(cells, share * noise.numel()) > 1e-3


def test_random_tokens_are_uniform_and_follow_from_their_numbers():
    positions = torch.arange(40_000)
    found = random_tokens(torch.tensor(7), positions, torch.tensor(3), 50)
    golden = 0x9E3779B97F4A7C15
    want = [(mix((row_key(7, i, 3) - golden) & MASK64) >> 1) % 50 for i in range(9)]
    assert found[:9].tolist() == want
    assert found.min() == 0 and found.max() == 49
    counts = found.bincount(minlength=50).double()
    # 49 degrees of freedom: beyond this once in a million seeds.
    assert ((counts - 800) ** 2 / 800).sum() < 120
    part = random_tokens(torch.tensor([7, 7]), positions[5:7], torch.tensor([3, 3]), 50)
    assert part.equal(found[5:7])
    for other in (
        random_tokens(torch.tensor(8), positions, torch.tensor(3), 50),
        random_tokens(torch.tensor(7), positions, torch.tensor(4), 50),
        (uniform(torch.tensor(7), positions, torch.tensor(3)) * 50).long(),
    ):
        assert (other == found).double().mean() < 0.03
