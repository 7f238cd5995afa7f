# SPDX-License-Identifier: Apache-2.0
"""Model runner V2's kernels for a CPU.

The references below are the Triton programs of vLLM 0.32 and 0.33 read one program at a
time, in plain Python on flat lists: no shared code with `vllm_dlm.kernels.runner_cpu`.
Here are those that prepare a batch; test_runner_cpu_outputs.py has the others.
"""

import inspect

import pytest

pytest.importorskip("vllm")

from vllm.platforms import vllm_version_matches_substr

if not vllm_version_matches_substr("cpu"):
    pytest.skip("needs a CPU build of vLLM", allow_module_level=True)

import torch
from runner_cpu_batch import (
    DRAFTS,
    MAX_REQS,
    MAX_TOKENS,
    MODEL_LEN,
    SEEDS,
    Batch,
    addresses,
    cumulative,
)

from vllm_dlm.kernels.numba_jit import jit
from vllm_dlm.kernels.runner_cpu import KERNELS, block_table, input_batch
from vllm_dlm.kernels.runner_cpu.fitting import (
    FittedKernels,
    fit,
    kernel_parameters,
    refusal,
)


@pytest.mark.parametrize("name", KERNELS)
def test_parameters_are_those_of_the_triton_kernel(name):
    given = tuple(inspect.signature(KERNELS[name]).parameters)
    expected = kernel_parameters(name)
    assert given[: len(expected)] == expected
    assert given[len(expected) :] in ((), ("num_warps",))


def test_a_replacement_is_fitted_to_either_list():
    def replacement(first, since=None, last=0, num_warps=1):
        seen.append((first, since, last))

    seen: list = []
    older = fit(replacement, "kernel", ("first", "last"))
    older(1, 2, num_warps=4)
    older(1, last=2)
    assert fit(replacement, "kernel", ("first", "since", "last")) is replacement
    replacement(1, 3, 2)
    assert seen == [(1, None, 2), (1, None, 2), (1, 3, 2)]
    assert tuple(inspect.signature(older).parameters) == ("first", "last")


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        (("first", "since", "scale", "last"), "has 'scale', unlike"),
        (("since", "last"), "lacks 'first', unlike"),
        (("start", "last"), "has 'start' and lacks 'first', unlike"),
    ],
)
def test_a_kernel_with_other_parameters_is_refused(parameters, said):
    def replacement(first, since=None, last=0):
        raise AssertionError

    with pytest.raises(RuntimeError, match=f"the kernel a.b of vLLM .* {said}"):
        fit(replacement, "a.b", parameters)
    kernels = FittedKernels({"vllm.v1.worker.gpu.input_batch.no_kernel": replacement})
    (problem,) = kernels.problems().values()
    assert "has no kernel vllm.v1.worker.gpu.input_batch.no_kernel" in problem
    with pytest.raises(RuntimeError, match=r"has no kernel.*`vllm-dlm doctor` lists"):
        refusal(problem)(1, BLOCK_SIZE=2)


def test_jit_works_where_no_cache_can_be_written():
    namespace: dict = {}
    # numba finds no file to cache beside, as with a read-only installation.
    exec(compile("def double(x): return 2 * x", "<nowhere>", "exec"), namespace)
    assert jit()(namespace["double"])(21) == 42


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("shape", [(MAX_REQS,), (MAX_REQS, MODEL_LEN)])
@pytest.mark.parametrize("seed", SEEDS)
def test_apply_write(seed, shape, dtype):
    batch = Batch(seed)
    writes = 5
    width = shape[1] if len(shape) > 1 else 1
    indices = batch.ints(0, MAX_REQS, writes)
    lengths = batch.ints(1, max(2, width // 2), writes)
    starts = batch.ints(0, max(1, width // 2), writes)
    ends = cumulative(lengths)[1:]
    contents = batch.ints(0, 1000, int(ends[-1])).to(dtype)
    output = torch.zeros(shape, dtype=dtype)
    flat, stride = output.flatten().tolist(), output.stride(0)
    for pid in range(writes):
        begin = int(ends[pid - 1]) if pid > 0 else 0
        row = int(indices[pid]) * stride + int(starts[pid])
        for i in range(int(ends[pid]) - begin):
            flat[row + i] = contents[begin + i].item()
    block_table._apply_write_kernel(
        output,
        stride,
        indices,
        starts,
        contents,
        ends,
        None,
        BLOCK_SIZE=1024,
        MULTI_GROUP=False,
    )
    assert output.flatten().tolist() == flat


@pytest.mark.parametrize("seed", SEEDS)
def test_apply_write_to_groups(seed):
    batch = Batch(seed)
    tables = [torch.zeros(MAX_REQS, width, dtype=torch.int32) for width in (5, 9)]
    expected = [table.tolist() for table in tables]
    groups, indices = batch.ints(0, 2, 6), batch.ints(0, MAX_REQS, 6)
    starts, lengths = batch.ints(0, 3, 6), batch.ints(1, 3, 6)
    ends = cumulative(lengths)[1:]
    contents = batch.ints(1, 1000, int(ends[-1]))
    for pid in range(6):
        begin = int(ends[pid - 1]) if pid > 0 else 0
        for i in range(begin, int(ends[pid])):
            row = expected[groups[pid]][indices[pid]]
            row[starts[pid] + i - begin] = int(contents[i])
    block_table._apply_write_kernel(
        addresses(tables),
        torch.tensor([table.stride(0) for table in tables]),
        indices,
        starts,
        contents,
        ends,
        groups,
        BLOCK_SIZE=1024,
        MULTI_GROUP=True,
    )
    assert [table.tolist() for table in tables] == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_gather_block_tables(seed):
    batch = Batch(seed)
    widths = (4, 7)
    sources = [batch.ints(1, 99, MAX_REQS, width) for width in widths]
    targets = [torch.full((MAX_REQS, width), -1).int() for width in widths]
    num_blocks = torch.stack([batch.ints(0, width + 1, MAX_REQS) for width in widths])
    expected = [target.tolist() for target in targets]
    for group in range(2):
        for row, slot in enumerate(batch.idx_mapping.tolist()):
            for i in range(int(num_blocks[group, slot])):
                expected[group][row][i] = int(sources[group][slot, i])
    block_table._gather_block_tables_kernel(
        batch.idx_mapping,
        addresses(sources),
        addresses(targets),
        torch.tensor(widths),
        num_blocks,
        num_blocks.stride(0),
        batch.num_reqs,
        BLOCK_SIZE=1024,
    )
    assert [target.tolist() for target in targets] == expected


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_gather_block_tables_of_vllm_0_33(seed, masked):
    """Rows that a larger batch has left are zeroed, blocks behind a window nulled."""
    batch = Batch(seed)
    widths, reach, block_sizes = (4, 7), (0, 9), (16, 8)
    sources = [batch.ints(1, 99, MAX_REQS, width) for width in widths]
    targets = [torch.full((MAX_REQS, width), 7).int() for width in widths]
    num_blocks = torch.stack([batch.ints(0, width + 1, MAX_REQS) for width in widths])
    expected = [target.tolist() for target in targets]
    for group, width in enumerate(widths):
        for row in range(MAX_REQS):
            if row >= batch.num_reqs:
                expected[group][row] = [0] * width
                continue
            slot, null = int(batch.idx_mapping[row]), 0
            if masked and reach[group] > 0:
                past = max(int(batch.computed[slot]) - reach[group], 0)
                null = past // block_sizes[group]
            for i in range(int(num_blocks[group, slot])):
                block = int(sources[group][slot, i])
                expected[group][row][i] = 0 if i < null else block
    block_table._gather_block_tables_kernel(
        batch.idx_mapping,
        addresses(sources),
        addresses(targets),
        torch.tensor(widths),
        num_blocks,
        num_blocks.stride(0),
        batch.num_reqs,
        batch.computed,
        torch.tensor(reach).int(),
        torch.tensor(block_sizes).int(),
        MASK_SLIDING_WINDOW=masked,
        BLOCK_SIZE=1024,
    )
    assert [target.tolist() for target in targets] == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_compute_slot_mappings(seed):
    batch = Batch(seed)
    block_sizes = torch.tensor([16, 8, 16], dtype=torch.int32)
    enabled = torch.tensor([True, True, False])
    tables = [batch.ints(1, 10**6, MAX_REQS, MODEL_LEN // int(b)) for b in block_sizes]
    batch.idx_mapping[0] = -1  # a row that owns no blocks
    positions = batch.ints(0, MODEL_LEN, MAX_TOKENS, dtype=torch.int64)
    mappings = torch.full((3, MAX_TOKENS), -7)
    expected = mappings.tolist()
    for group in range(3):
        for row in range(batch.num_reqs + 1):
            begin = int(batch.query_start_loc[row])
            if row == batch.num_reqs:
                expected[group][begin:] = [-1] * (MAX_TOKENS - begin)
                continue
            slot = int(batch.idx_mapping[row])
            for token in range(begin, int(batch.query_start_loc[row + 1])):
                block, offset = divmod(int(positions[token]), int(block_sizes[group]))
                if slot < 0 or not enabled[group]:
                    expected[group][token] = -1
                else:
                    block_id = int(tables[group][slot, block])
                    expected[group][token] = block_id * int(block_sizes[group]) + offset
    block_table._compute_slot_mappings_kernel(
        MAX_TOKENS,
        batch.idx_mapping,
        batch.query_start_loc,
        positions,
        addresses(tables),
        torch.tensor([table.stride(0) for table in tables]),
        block_sizes,
        enabled,
        torch.tensor([True] * 3),
        mappings,
        mappings.stride(0),
        0,
        CP_SIZE=1,
        CP_INTERLEAVE=1,
        PAD_ID=-1,
        TRITON_BLOCK_SIZE=1024,
    )
    assert mappings.tolist() == expected


@pytest.mark.parametrize("num_lookahead", [1, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_prepare_prefill_inputs(seed, num_lookahead):
    batch = Batch(seed)
    input_ids = torch.full((MAX_TOKENS,), -7).int()
    lookahead = torch.full((num_lookahead, MAX_REQS), -7).int()
    expected, expected_ahead = input_ids.tolist(), lookahead.tolist()
    for row, slot in enumerate(batch.idx_mapping.tolist()):
        computed, prefill = int(batch.computed[slot]), int(batch.prefill_lens[slot])
        if computed >= prefill:
            continue
        begin, query_len = int(batch.query_start_loc[row]), int(batch.query_lens[row])
        for i in range(query_len):
            expected[begin + i] = int(batch.token_ids[slot, computed + i])
        for i in range(num_lookahead):
            at = computed + query_len + i
            known = at < prefill
            expected_ahead[i][slot] = int(batch.token_ids[slot, at]) if known else 0
    input_batch._prepare_prefill_inputs_kernel(
        input_ids,
        lookahead,
        lookahead.stride(0),
        num_lookahead,
        batch.idx_mapping,
        batch.query_start_loc,
        batch.token_ids,
        batch.token_ids.stride(0),
        batch.prefill_lens,
        batch.computed,
        BLOCK_SIZE=1024,
        LOOKAHEAD_BLOCK=4,
    )
    assert input_ids.tolist() == expected
    assert lookahead.tolist() == expected_ahead


def test_prepare_prefill_inputs_stays_inside_the_row():
    """A canvas after the prompt's tail may reach past the model's length."""
    input_ids = torch.full((6,), -7).int()
    token_ids = torch.arange(8).int().view(2, 4)
    input_batch._prepare_prefill_inputs_kernel(
        input_ids,
        torch.zeros(1, 2).int(),
        2,
        1,
        torch.tensor([0]),
        torch.tensor([0, 5]).int(),
        token_ids,
        4,
        torch.tensor([3, 3]).int(),
        torch.tensor([1, 0]).int(),
        BLOCK_SIZE=1024,
        LOOKAHEAD_BLOCK=1,
    )
    assert input_ids.tolist() == [1, 2, 3, -7, -7, -7]


@pytest.mark.parametrize("seed", SEEDS)
def test_prepare_pos_seq_lens(seed):
    batch = Batch(seed)
    positions = torch.full((MAX_TOKENS,), -7)
    seq_lens = torch.full((MAX_REQS,), -7).int()
    expected, expected_lens = positions.tolist(), [0] * MAX_REQS
    for row, slot in enumerate(batch.idx_mapping.tolist()):
        computed, begin = int(batch.computed[slot]), int(batch.query_start_loc[row])
        query_len = int(batch.query_lens[row])
        expected_lens[row] = computed + query_len
        expected[begin : begin + query_len] = range(computed, computed + query_len)
    input_batch._prepare_pos_seq_lens_kernel(
        positions,
        seq_lens,
        batch.idx_mapping,
        batch.query_start_loc,
        batch.computed,
        MAX_REQS,
        BLOCK_SIZE=1024,
    )
    assert positions.tolist() == expected
    assert seq_lens.tolist() == expected_lens


@pytest.mark.parametrize("num_new", [0, 1])
@pytest.mark.parametrize("seed", range(12))
def test_combine_sampled_and_draft_tokens(seed, num_new):
    batch = Batch(seed)
    num_logits = torch.clamp(batch.num_logits, min=num_new)
    cu_num_logits = cumulative(num_logits)
    input_ids = torch.full((MAX_TOKENS,), -7).int()
    last_sampled = batch.ints(1000, 2000, MAX_REQS, 1, dtype=torch.int64)
    drafts = batch.ints(2000, 3000, MAX_REQS, DRAFTS, dtype=torch.int64)
    logits_indices = torch.full((int(cu_num_logits[-1]),), -7)
    expected, expected_indices = input_ids.tolist(), logits_indices.tolist()
    for row, slot in enumerate(batch.idx_mapping.tolist()):
        n, end = int(num_logits[row]), int(batch.query_start_loc[row + 1])
        first = int(cu_num_logits[row])
        expected_indices[first : first + n] = range(end - n, end)
        seq_len, prefill = int(batch.seq_lens[row]), int(batch.prefill_lens[slot])
        if seq_len <= prefill:
            continue
        if num_new > 0 and seq_len - n >= prefill:
            expected[end - n] = int(last_sampled[slot, 0])
        for i in range(n - num_new):
            expected[end - (n - num_new) + i] = int(drafts[slot, i])
    input_batch._combine_sampled_and_draft_tokens_kernel(
        input_ids,
        batch.idx_mapping,
        last_sampled,
        batch.query_start_loc,
        batch.seq_lens,
        batch.prefill_lens,
        drafts,
        drafts.stride(0),
        cu_num_logits,
        logits_indices,
        NUM_NEW_SAMPLED_TOKENS=num_new,
        BLOCK_SIZE=16,
    )
    assert input_ids.tolist() == expected
    assert logits_indices.tolist() == expected_indices
