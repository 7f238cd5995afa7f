# SPDX-License-Identifier: Apache-2.0
"""Model runner V2's kernels for a CPU that work on what was sampled.

The references are the Triton programs, as in `test_runner_cpu.py`.
"""

import pytest

pytest.importorskip("vllm")

from vllm.platforms import vllm_version_matches_substr

if not vllm_version_matches_substr("cpu"):
    pytest.skip("needs a CPU build of vLLM", allow_module_level=True)

import torch
from runner_cpu_batch import (
    DRAFTS,
    MAX_REQS,
    MODEL_LEN,
    SEEDS,
    Batch,
    addresses,
)

from vllm_dlm.kernels.runner_cpu import block_table, input_batch, vocabulary


@pytest.mark.parametrize("seed", SEEDS)
def test_expand_idx_mapping(seed):
    batch = Batch(seed)
    expected = [
        (slot, i)
        for slot, n in zip(
            batch.idx_mapping.tolist(), batch.num_logits.tolist(), strict=True
        )
        for i in range(n)
    ]
    expanded = torch.empty(len(expected), dtype=torch.int64)
    local_positions = torch.empty(len(expected), dtype=torch.int32)
    input_batch._expand_idx_mapping_kernel(
        batch.idx_mapping,
        expanded,
        local_positions,
        batch.cu_num_logits,
        BLOCK_SIZE=DRAFTS,
    )
    pairs = zip(expanded.tolist(), local_positions.tolist(), strict=True)
    assert list(pairs) == expected


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("seed", SEEDS)
def test_get_num_sampled_and_rejected(seed, dtype):
    batch = Batch(seed)
    sampled = torch.minimum(batch.num_logits, batch.ints(0, 4, batch.num_reqs))
    sampled = sampled.to(dtype)
    rejected = torch.full_like(sampled, -7)
    expected = []
    for row, slot in enumerate(batch.idx_mapping.tolist()):
        chunk = int(batch.seq_lens[row]) < int(batch.prefill_lens[slot])
        count = 0 if chunk else int(sampled[row])
        expected.append((count, 0 if chunk else int(batch.num_logits[row]) - count))
    input_batch._get_num_sampled_and_rejected_kernel(
        sampled,
        rejected,
        batch.seq_lens,
        batch.cu_num_logits,
        batch.idx_mapping,
        batch.prefill_lens,
    )
    assert list(zip(sampled.tolist(), rejected.tolist(), strict=True)) == expected


@pytest.mark.parametrize("with_counts", [False, True])
@pytest.mark.parametrize("with_queries", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("seed", SEEDS)
def test_post_update(seed, dtype, with_queries, with_counts):
    batch = Batch(seed)
    batch.idx_mapping[-1] = -1  # filtered
    total_lens = batch.ints(1, MODEL_LEN - DRAFTS, MAX_REQS)
    # Every other column of a wider tensor: the kernel is given a row stride.
    wide = batch.ints(0, 50, batch.num_reqs, 2 * DRAFTS).to(dtype)
    sampled = wide[:, :DRAFTS]
    num_sampled = batch.ints(0, DRAFTS + 1, batch.num_reqs)
    num_rejected = torch.minimum(batch.query_lens, batch.ints(0, 9, batch.num_reqs))
    last_sampled = torch.full((MAX_REQS, 1), -7)
    counts = torch.zeros(MAX_REQS, 50, dtype=torch.int32) if with_counts else None
    tensors = [batch.computed, last_sampled, batch.token_ids, total_lens]
    tensors += [counts] if with_counts else []
    computed, last, tokens, totals, *tallies = [t.tolist() for t in tensors]
    for row, slot in enumerate(batch.idx_mapping.tolist()):
        if slot < 0:
            continue
        n, total = int(num_sampled[row]), totals[slot]
        if n > 0:
            last[slot][0] = int(sampled[row, n - 1])
            totals[slot] = total + n
        for i in range(n):
            tokens[slot][total + i] = int(sampled[row, i])
            if with_counts:
                tallies[0][slot][int(sampled[row, i])] += 1
        query_len = int(batch.query_lens[row]) if with_queries else 0
        computed[slot] += query_len - int(num_rejected[row])
    input_batch._post_update_kernel(
        batch.idx_mapping,
        batch.computed,
        last_sampled,
        counts,
        counts.stride(0) if with_counts else 0,
        sampled,
        sampled.stride(0),
        num_sampled,
        num_rejected,
        batch.query_start_loc if with_queries else None,
        batch.token_ids,
        batch.token_ids.stride(0),
        total_lens,
        num_warps=1,
    )
    assert [t.tolist() for t in tensors] == [computed, last, tokens, totals, *tallies]


def test_post_update_of_vllm_0_33_keeps_drafts():
    batch = Batch(0)
    batch.idx_mapping = torch.tensor([4, -1, 2])  # the second is filtered
    drafts = torch.arange(1, 7).view(3, 2)
    kept = torch.zeros(MAX_REQS, 2, dtype=torch.int64)
    none = torch.zeros(3).int()
    input_batch._post_update_kernel(
        batch.idx_mapping,
        batch.computed,
        torch.zeros(MAX_REQS, 1, dtype=torch.int64),
        None,
        0,
        torch.zeros(3, 1, dtype=torch.int64),
        1,
        none,
        none,
        None,
        batch.token_ids,
        batch.token_ids.stride(0),
        batch.ints(1, 9, MAX_REQS),
        drafts,
        kept,
        2,
        num_warps=1,
    )
    assert kept.tolist() == [[0, 0], [0, 0], [5, 6], [0, 0], [1, 2], [0, 0], [0, 0]]


@pytest.mark.parametrize("seed", SEEDS)
def test_post_update_num_computed_tokens(seed):
    batch = Batch(seed)
    expected = batch.computed.tolist()
    for row, slot in enumerate(batch.idx_mapping.tolist()):
        expected[slot] += int(batch.query_lens[row])
    input_batch._post_update_num_computed_tokens_kernel(
        batch.idx_mapping, batch.computed, batch.query_start_loc
    )
    assert batch.computed.tolist() == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_zero_kv_blocks(seed):
    batch = Batch(seed)
    caches = [batch.ints(1, 99, 6, stride) for stride in (8, 12)]
    page_sizes = torch.tensor([8, 5])
    blocks = torch.tensor([1, 4])
    expected = [cache.clone() for cache in caches]
    for cache, page in zip(expected, page_sizes.tolist(), strict=True):
        cache[blocks, :page] = 0
    block_table._zero_kv_blocks_kernel(
        addresses(caches), torch.tensor([8, 12]), page_sizes, blocks, BLOCK_SIZE=8
    )
    assert all(map(torch.equal, caches, expected))


@pytest.mark.parametrize("seed", SEEDS)
def test_prompt_logprobs_token_ids(seed):
    batch = Batch(seed)
    output = torch.full((batch.num_tokens,), -7)
    expected = output.tolist()
    for row, slot in enumerate(batch.idx_mapping.tolist()):
        begin = int(batch.query_start_loc[row])
        for i in range(int(batch.query_lens[row])):
            at = int(batch.computed[slot]) + 1 + i
            expected[begin + i] = int(batch.token_ids[slot, at])
    vocabulary._prompt_logprobs_token_ids_kernel(
        output,
        batch.query_start_loc,
        batch.idx_mapping,
        batch.computed,
        batch.token_ids,
        batch.token_ids.stride(0),
        BLOCK_SIZE=1024,
    )
    assert output.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", SEEDS)
def test_logprobs_and_ranks(seed, dtype):
    batch = Batch(seed)
    logits = torch.randn(5, 33, generator=batch.random).to(dtype)
    logits[0, 3:9] = logits[0, 3]  # ties
    tokens = batch.ints(0, 33, 5, 4, dtype=torch.int64)
    tokens[0, 0] = 5
    output = torch.empty(5, 4)
    vocabulary._topk_log_softmax_kernel(
        output, logits, 33, tokens, 4, 4, 33, BLOCK_SIZE=1024, TOPK_BLOCK_SIZE=4
    )
    torch.testing.assert_close(
        output, logits.double().log_softmax(-1).gather(-1, tokens).float()
    )
    ranks = torch.empty(5, dtype=torch.int64)
    vocabulary._ranks_kernel(ranks, logits, 33, tokens[:, 0], 33, BLOCK_SIZE=8192)
    rows = zip(logits.tolist(), tokens[:, 0].tolist(), strict=True)
    assert ranks.tolist() == [sum(x >= row[t] for x in row) for row, t in rows]


@pytest.mark.parametrize("num_topk", [0, 3])
def test_fill_logprob_token_ids(num_topk):
    chosen = torch.arange(100, 100 + 4 * 5).int().view(4, 5)
    num_chosen = torch.tensor([2, 0, 4, 0]).int()
    slots = torch.tensor([2, 3, 0])
    sampled = torch.tensor([7, 8, 9])
    topk = torch.arange(9).int().view(3, 3) if num_topk else chosen
    columns = max(num_topk, 4)
    output = torch.zeros(3, 1 + columns, dtype=torch.int64)
    valid = torch.zeros(3, 1 + columns, dtype=torch.bool)
    expected, expected_valid = output.tolist(), valid.tolist()
    for row, slot in enumerate(slots.tolist()):
        n = int(num_chosen[slot])
        source = chosen[slot, :n] if n > 0 else topk[row, :num_topk]
        values = [int(sampled[row]), *source.tolist()]
        expected[row][: len(values)] = values
        expected_valid[row][: len(values)] = [True] * len(values)
    vocabulary._fill_logprob_token_ids_kernel(
        output,
        output.stride(0),
        valid,
        valid.stride(0),
        sampled,
        topk,
        topk.stride(0),
        slots,
        num_chosen,
        chosen,
        chosen.stride(0),
        NUM_TOPK=num_topk,
        PADDED_COLS=4,
    )
    assert output.tolist() == expected and valid.tolist() == expected_valid


def test_num_nans():
    logits = torch.zeros(3, 9)
    logits[1, 2:5] = torch.nan
    counts = torch.empty(3, dtype=torch.int32)
    vocabulary._num_nans_kernel(logits, 9, counts, 9, BLOCK_SIZE=8192)
    assert counts.tolist() == [0, 3, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", SEEDS)
def test_apply_grammar_bitmask(seed, dtype):
    batch = Batch(seed)
    vocab, stride = 70, DRAFTS
    logits = torch.randn(
        int(batch.cu_num_logits[-1]), vocab, generator=batch.random
    ).to(dtype)
    # Masks of places beyond a request's rows are to be ignored.
    mapping = [row * stride + i for row in range(batch.num_reqs) for i in (0, 3)]
    indices = torch.tensor(mapping, dtype=torch.int32)
    masks = batch.ints(-(2**31), 2**31 - 1, len(mapping), 3)
    expected = logits.clone()
    for mask, place in enumerate(mapping):
        row, i = divmod(place, stride)
        if i >= int(batch.num_logits[row]):
            continue
        for token in range(vocab):
            word = int(masks[mask, token // 32])
            if not (word >> (token % 32)) & 1:
                expected[int(batch.cu_num_logits[row]) + i, token] = -torch.inf
    vocabulary._apply_grammar_bitmask_kernel(
        logits,
        logits.stride(0),
        indices,
        batch.cu_num_logits,
        masks,
        masks.stride(0),
        vocab,
        MASK_STRIDE=stride,
        BLOCK_SIZE=8192,
    )
    assert torch.equal(logits, expected)
