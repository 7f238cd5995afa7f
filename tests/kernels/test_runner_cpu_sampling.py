# SPDX-License-Identifier: Apache-2.0
"""Model runner V2's kernels for sampling and verification on a CPU.

Rows are compared with plain Python on lists; draws with the hash of a public test
vector, and verification as a whole, through vLLM's own host code, with the target's
exact probabilities.
"""

import math

import pytest

pytest.importorskip("vllm")

from vllm.platforms import current_platform, vllm_version_matches_substr

if not vllm_version_matches_substr("cpu"):
    pytest.skip("needs a CPU build of vLLM", allow_module_level=True)

import torch

from vllm_dlm.kernels.runner_cpu import constraints, gumbel, verification

INF = math.inf
SLOTS, VOCAB = 5, 70


class Rows:
    """Rows of three requests in scattered slots: a last token, and drafts behind it."""

    def __init__(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)

        def ints(low, high, *shape):
            return torch.randint(low, high, shape, generator=random, dtype=torch.int32)

        self.ints, self.random = ints, random
        self.slots = torch.tensor([3, 0, 4]).repeat_interleave(torch.tensor([3, 1, 2]))
        self.places = torch.tensor([0, 1, 2, 0, 0, 1], dtype=torch.int32)
        self.inputs = ints(0, VOCAB, 6)
        self.inputs[2] = -1  # a draft that is none
        self.logits = torch.randn(6, VOCAB, generator=random)
        self.prompt_lens = ints(1, 8, SLOTS)
        self.total_lens = self.prompt_lens + ints(0, 8, SLOTS)
        self.token_ids = ints(0, VOCAB, SLOTS, 16)

    def drafts(self, row: int) -> list[int]:
        place = int(self.places[row])
        return self.inputs[row - place + 1 : row + 1].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_penalties_of_counted_tokens(seed):
    rows = Rows(seed)
    repetition = torch.tensor([1.0, 1.0, 2.0, 1.5, 0.7])
    frequency = torch.tensor([0.0, 0.0, 0.0, 0.25, 0.0])
    presence = torch.tensor([0.0, 0.0, 0.0, -0.5, 0.0])
    mask = torch.zeros(SLOTS, -(-VOCAB // 32), dtype=torch.int32)
    counts = torch.zeros(SLOTS, VOCAB, dtype=torch.int32)
    fresh = torch.tensor([3, 0, 4])
    constraints._bincount_kernel(
        fresh,
        rows.token_ids,
        16,
        rows.prompt_lens,
        rows.total_lens,
        mask,
        3,
        counts,
        VOCAB,
        BLOCK_SIZE=1024,
    )
    expected = rows.logits.tolist()
    for row, slot in enumerate(rows.slots.tolist()):
        text = rows.token_ids[slot, : rows.total_lens[slot]].tolist()
        prompt, written = text[: rows.prompt_lens[slot]], text[rows.prompt_lens[slot] :]
        assert counts[slot].tolist() == [written.count(t) for t in range(VOCAB)]
        written = written + rows.drafts(row)
        for token in range(VOCAB):
            score, penalty = expected[row][token], float(repetition[slot])
            if token in prompt or token in written:
                score = score / penalty if score > 0 else score * penalty
            score -= float(frequency[slot]) * written.count(token)
            score -= float(presence[slot]) * (token in written)
            expected[row][token] = score
    constraints._penalties_kernel(
        rows.logits,
        VOCAB,
        rows.slots,
        rows.inputs,
        rows.places,
        repetition,
        frequency,
        presence,
        mask,
        3,
        counts,
        VOCAB,
        VOCAB,
        BLOCK_SIZE=8192,
    )
    torch.testing.assert_close(rows.logits, torch.tensor(expected))


@pytest.mark.parametrize("seed", range(4))
def test_bad_words_end_a_text_with_its_drafts(seed):
    rows = Rows(seed)
    text = rows.token_ids[3, rows.prompt_lens[3] : rows.total_lens[3]].tolist()
    first_draft = int(rows.inputs[1])
    words = {3: [[7], [*text[-1:], 8], [*text, first_draft, 9], [69] * 15 + [5]]}
    tokens = torch.zeros(SLOTS, 64, dtype=torch.int32)
    offsets = torch.zeros(SLOTS, 8, dtype=torch.int32)
    numbers = torch.zeros(SLOTS, dtype=torch.int32)
    for slot, of_slot in words.items():
        numbers[slot], end = len(of_slot), 0
        for place, word in enumerate(of_slot):
            tokens[slot, end : end + len(word)] = torch.tensor(word)
            end += len(word)
            offsets[slot, place + 1] = end
    expected = rows.logits.clone()
    for row in (0, 1, 2):
        known = text + rows.drafts(row)
        for word in words[3]:
            if known[len(known) - len(word) + 1 :] == word[:-1] or len(word) == 1:
                expected[row, word[-1]] = -INF
    constraints._bad_words_kernel(
        rows.logits,
        VOCAB,
        rows.slots,
        tokens,
        64,
        offsets,
        8,
        numbers,
        rows.token_ids,
        16,
        rows.prompt_lens,
        rows.total_lens,
        rows.inputs,
        rows.places,
    )
    assert torch.equal(rows.logits, expected)
    assert (rows.logits[0] == -INF).any() and (rows.logits[3] > -INF).all()


@pytest.mark.parametrize("restores", [False, True])
def test_biases_and_least_lengths(restores):
    rows = Rows(0)
    none = torch.zeros(SLOTS, dtype=torch.int32)
    allowed = torch.tensor([2, 5, 60], dtype=torch.int32).repeat(SLOTS, 1)
    biased, bias = allowed.clone(), torch.tensor([1.5, -2.0, 0.0]).repeat(SLOTS, 1)
    num_allowed, num_biased, num_stops = none.clone(), none.clone(), none.clone()
    num_allowed[3], num_biased[0], num_stops[4] = 3, 2, 3
    least = torch.full((SLOTS,), 12, dtype=torch.int32)
    expected = rows.logits.clone()
    others = [token for token in range(VOCAB) if token not in (2, 5, 60)]
    expected[:3, others] = -INF
    expected[3, 2] += 1.5
    expected[3, 5] -= 2
    expected[4, [2, 5, 60]] = -INF  # the text has 11 tokens with the row's input
    rows.logits[5, others] = expected[5, others] = -INF
    if not restores:
        expected[5] = -INF
    constraints._bias_kernel(
        rows.logits,
        VOCAB,
        VOCAB,
        rows.slots,
        num_allowed,
        allowed,
        3,
        num_biased,
        biased,
        3,
        bias,
        3,
        torch.tensor([0, 1, 2, 0, 10, 10]),
        least,
        num_stops,
        torch.ones(SLOTS, dtype=torch.int32),
        allowed,
        3,
        BLOCK_SIZE=1024,
        LOGITS_BLOCK_SIZE=8192,
        CHECK_ALL_MASKED_ROWS=restores,
    )
    torch.testing.assert_close(rows.logits, expected)


def test_temperature_and_min_p():
    rows = Rows(1)
    temperatures = torch.tensor([0.0, 9.0, 9.0, 0.5, 1.0])
    expected = rows.logits.clone()
    expected[:3] *= 2
    constraints._temperature_kernel(
        rows.logits, VOCAB, rows.slots, temperatures, VOCAB, BLOCK_SIZE=8192
    )
    torch.testing.assert_close(rows.logits, expected)
    shares = torch.tensor([0.3, 0.9, 0.9, 0.1, 0.0])
    probs = expected.softmax(1)
    least = shares[rows.slots, None] * probs.amax(1, keepdim=True)
    constraints._min_p_kernel(
        rows.logits, VOCAB, rows.slots, shares, VOCAB, BLOCK_SIZE=1024
    )
    assert torch.equal(rows.logits > -INF, probs >= least)


# Draws ------------------------------------------------------------------------------


def hashed(data: bytes, state: int = 0) -> int:
    """MurmurHash3 x86_32 of whole words, from its public description."""
    word_mask = 0xFFFFFFFF

    def rotate(value: int, bits: int) -> int:
        return (value << bits | value >> (32 - bits)) & word_mask

    for begin in range(0, len(data), 4):
        word = int.from_bytes(data[begin : begin + 4], "little")
        word = rotate(word * 0xCC9E2D51 & word_mask, 15) * 0x1B873593 & word_mask
        state = (rotate(state ^ word, 13) * 5 + 0xE6546B64) & word_mask
    state ^= len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = (state ^ state >> shift) * factor & word_mask
    return state ^ state >> 16


def test_the_hash_is_murmurs():
    # Test vectors of the hash's author and of SMHasher's users.
    assert hashed(b"test", 0x9747B28C) == 0x704B81DC
    assert hashed(bytes(4), 0) == 0x2362F9DE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("drafting", [False, True])
def test_the_best_token_with_noise(drafting, dtype):
    rows = Rows(2)
    seeds = torch.tensor([0, 1, 2, -5, 1 << 40])
    temperatures = torch.tensor([0.0, 9.0, 9.0, 0.5, 1.0])
    positions = torch.tensor([5, 6, 7, 5, 5, 6])
    slots = rows.slots.clone()
    slots[5] = -1  # no request: greedy
    tokens = torch.zeros(6, 3, dtype=torch.int64)
    scores = torch.zeros(6, 3, dtype=dtype)
    cache = torch.zeros(SLOTS, 4, VOCAB)
    gumbel._gumbel_sample_kernel(
        tokens,
        3,
        scores,
        3,
        cache,
        4 * VOCAB,
        VOCAB,
        torch.tensor([0, 1, 2, 0, 0, 1]),
        rows.logits,
        VOCAB,
        rows.logits,
        VOCAB,
        slots,
        seeds,
        positions,
        temperatures,
        VOCAB,
        BLOCK_SIZE=32,
        IS_DRAFTING=drafting,
        APPLY_TEMPERATURE=True,
        USE_FP64=dtype == torch.float64,
        PER_TOKEN_COL=True,
    )
    for row, slot in enumerate(slots.tolist()):
        noisy = rows.logits[row].double().tolist()
        if slot >= 0 and temperatures[slot] > 0:
            position = int(positions[row]) + (drafting << 30)
            seed = (int(seeds[slot]) % (1 << 64)).to_bytes(8, "little")
            for token in range(VOCAB):
                key = (
                    seed + position.to_bytes(4, "little") + token.to_bytes(4, "little")
                )
                u = (hashed(key) + 0.5) / 2**32
                if dtype == torch.float64:
                    bits = hashed(key, 0x9E3779B9) << 32 | hashed(key)
                    u = ((bits >> 11) + 0.5) / 2**53
                    noise = -math.log(-math.log(u))
                else:
                    noise = -math.log(-math.log1p(-u))
                noisy[token] = noisy[token] / float(temperatures[slot]) + noise
        blocks = [noisy[begin : begin + 32] for begin in range(0, VOCAB, 32)]
        best = [block.index(max(block)) + 32 * i for i, block in enumerate(blocks)]
        assert tokens[row].tolist() == best
        torch.testing.assert_close(
            scores[row].double(),
            torch.tensor([noisy[token] for token in best], dtype=torch.float64),
            rtol=1e-4,
            atol=1e-4,
        )
    places = (rows.slots[:5], torch.tensor([0, 1, 2, 0, 0]))
    assert torch.equal(cache[places], rows.logits[:5])
    assert not cache[4, 1].any()


# Verification -----------------------------------------------------------------------


def test_rows_of_a_prompts_tail_have_no_draft():
    rows = Rows(3)
    drafts, positions = torch.zeros(6).int(), torch.zeros(6, dtype=torch.int64)
    prefill_lens = torch.tensor([9, 9, 9, 5, 9], dtype=torch.int32)
    where = torch.tensor([4, 5, 6, 1, 2, 3])
    inputs = torch.arange(100, 107).int()
    verification._gather_draft_sampled_kernel(
        drafts,
        positions,
        inputs,
        torch.arange(7) + 4,
        where,
        rows.slots,
        rows.places,
        prefill_lens,
        6,
        BLOCK_SIZE=1024,
    )
    assert drafts.tolist() == [104, 105, 106, 101, 102, -1]
    assert positions.tolist() == [8, 9, 10, 5, 6, 7]


VERIFIED, STEPS, WORDS = 8_000, 2, 5


def verified(temperature: float, certain: bool, absent: bool = False):
    """Tokens [requests, 3] and their number, and the target's logits [3, words]."""
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    current_platform.register_triton_kernel_overrides()
    random = torch.Generator().manual_seed(11)
    target = torch.randn(STEPS + 1, WORDS, generator=random) * 2
    target[1, 3] = -INF
    draft = torch.randn(STEPS, WORDS, generator=random)
    draft[0, 2] = -INF
    slots = torch.randperm(VERIFIED, generator=random)
    q = (draft / (temperature or 1)).softmax(1)
    drawn = torch.multinomial(q, VERIFIED, replacement=True, generator=random).t()
    if certain:
        drawn = torch.tensor([1, 4]).expand(VERIFIED, 2).clone()
    if absent:
        drawn[:, 1] = -1
    inputs = torch.cat((torch.zeros(VERIFIED, 1), drawn), dim=1).flatten().int()
    draft_logits = None
    if not certain:
        draft_logits = draft.expand(VERIFIED, STEPS, WORDS).contiguous()
    tokens, counts = rejection_sample(
        target.div(temperature or 1).repeat(VERIFIED, 1),
        draft_logits,
        inputs,
        torch.arange(VERIFIED + 1, dtype=torch.int32) * 3,
        torch.tensor([7, 8, 9]).repeat(VERIFIED),
        slots,
        slots.repeat_interleave(3),
        torch.arange(3, dtype=torch.int32).repeat(VERIFIED),
        torch.full((VERIFIED,), temperature),
        torch.arange(VERIFIED) * 7919,
        STEPS,
    )
    return tokens, counts, target, drawn


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("certain", [False, True])
def test_verified_tokens_have_the_targets_distribution(certain, absent):
    tokens, counts, target, drawn = verified(0.8, certain, absent)
    p = (target / 0.8).softmax(1).double()
    kept = counts > 1
    for seen, expected in (
        (tokens[:, 0], p[0]),
        (tokens[kept, 1], p[1]),
        (tokens[counts > 2, 2], p[2]),
    ):
        if len(seen):
            observed = torch.bincount(seen, minlength=WORDS).double()
            deviation = (observed - expected * len(seen)).abs()
            assert (deviation < 5 * (expected * len(seen)).sqrt() + 1e-6).all()
    assert torch.equal(tokens[kept, 0], drawn[kept, 0])
    assert bool((counts > 2).any()) != absent
    assert 0.2 < kept.double().mean() < 0.98


@pytest.mark.parametrize("certain", [False, True])
def test_greedy_verification_writes_the_targets_best_tokens(certain):
    tokens, counts, target, drawn = verified(0.0, certain)
    best = target.argmax(1)
    right = (drawn == best[:2]).long().cumprod(1).sum(1)
    assert torch.equal(counts.long(), right + 1)
    for place in range(3):
        assert (tokens[counts > place, place] == best[place]).all()
