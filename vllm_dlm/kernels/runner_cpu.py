# SPDX-License-Identifier: Apache-2.0
"""Model runner V2's Triton kernels for a CPU without Triton.

Each function stands in for the kernel of the same name in `vllm.v1.worker`: same
parameters in the same order, called once per launch instead of once per program.
vLLM's dispatcher drops the grid, so it is read off the shapes. Loops run in numba;
the few kernels over the vocabulary are torch. Source: vLLM 0.32.
"""

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba.core import cgutils, types
from numba.extending import intrinsic

from vllm_dlm.kernels.numba_jit import jit

_jit = jit()

_NO_ROWS = np.empty((0, 0), dtype=np.int32)


@intrinsic
def _as_pointer(typing_context: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


def _apply_write_kernel(
    output_ptr: torch.Tensor,
    output_stride: torch.Tensor | int,
    write_indices_ptr: torch.Tensor,
    write_starts_ptr: torch.Tensor,
    write_contents_ptr: torch.Tensor,
    write_cu_lens_ptr: torch.Tensor,
    write_group_ids_ptr: torch.Tensor | None,
    BLOCK_SIZE: int,
    MULTI_GROUP: bool,
) -> None:
    """Write runs of values into rows: `output[index, start : start + len] = run`.

    Args:
        output_ptr: `[rows]` or `[rows, width]`; with MULTI_GROUP uint64 `[groups]`,
            the addresses of int32 tables.
        output_stride: row stride; with MULTI_GROUP int64 `[groups]`.
        write_indices_ptr, write_starts_ptr: int32 `[writes]`.
        write_contents_ptr: the runs, one after another.
        write_cu_lens_ptr: int32 `[writes]`, ends of the runs.
        write_group_ids_ptr: int32 `[writes]`, with MULTI_GROUP only.
    """
    indices = write_indices_ptr.numpy()
    starts = write_starts_ptr.numpy()
    contents = write_contents_ptr.numpy()
    ends = write_cu_lens_ptr.numpy()
    if MULTI_GROUP:
        assert isinstance(output_stride, torch.Tensor)
        assert write_group_ids_ptr is not None
        _apply_write_groups(
            output_ptr.numpy(),
            output_stride.numpy(),
            indices,
            starts,
            contents,
            ends,
            write_group_ids_ptr.numpy(),
        )
    else:
        # view, not reshape: a copy would swallow the writes.
        output = output_ptr.view(-1).numpy()
        _apply_write(output, output_stride, indices, starts, contents, ends)


@_jit
def _apply_write(output, stride, indices, starts, contents, ends):  # type: ignore[no-untyped-def]
    begin = 0
    for write in range(indices.shape[0]):
        base = np.int64(indices[write]) * stride + starts[write] - begin
        for i in range(begin, ends[write]):
            output[base + i] = contents[i]
        begin = ends[write]


@_jit
def _apply_write_groups(addresses, strides, indices, starts, contents, ends, groups):  # type: ignore[no-untyped-def]
    begin = 0
    for write in range(indices.shape[0]):
        group = groups[write]
        base = np.int64(indices[write]) * strides[group] + starts[write]
        length = ends[write] - begin
        output = numba.carray(_as_pointer(addresses[group]), (base + length,), np.int32)
        for i in range(length):
            output[base + i] = contents[begin + i]
        begin = ends[write]


def _gather_block_tables_kernel(
    batch_idx_to_req_idx: torch.Tensor,
    src_block_table_ptrs: torch.Tensor,
    dst_block_table_ptrs: torch.Tensor,
    block_table_strides: torch.Tensor,
    num_blocks_ptr: torch.Tensor,
    num_blocks_stride: int,
    num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """Copy the block-table rows of the batch's requests to the front, per KV group.

    The launch's padded rows, which Triton zeroes, exist under CUDA graphs only.

    Args:
        batch_idx_to_req_idx: `[num_reqs]`.
        src_block_table_ptrs, dst_block_table_ptrs: uint64 `[groups]`, addresses of
            int32 `[max_num_reqs, stride]`.
        block_table_strides: int64 `[groups]`.
        num_blocks_ptr: int32 `[groups, max_num_reqs]`, used blocks of each row.
    """
    _gather_block_tables(
        batch_idx_to_req_idx.numpy(),
        src_block_table_ptrs.numpy(),
        dst_block_table_ptrs.numpy(),
        block_table_strides.numpy(),
        num_blocks_ptr.numpy(),
    )


@_jit
def _gather_block_tables(slots, sources, targets, strides, num_blocks):  # type: ignore[no-untyped-def]
    for group in range(strides.shape[0]):
        stride = strides[group]
        source = numba.carray(
            _as_pointer(sources[group]), (num_blocks.shape[1], stride), np.int32
        )
        target = numba.carray(
            _as_pointer(targets[group]), (slots.shape[0], stride), np.int32
        )
        for row in range(slots.shape[0]):
            slot = slots[row]
            for i in range(num_blocks[group, slot]):
                target[row, i] = source[slot, i]


def _compute_slot_mappings_kernel(
    max_num_tokens: int,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    pos: torch.Tensor,
    block_table_ptrs: torch.Tensor,
    block_table_strides: torch.Tensor,
    block_sizes: torch.Tensor,
    slot_mapping_enabled: torch.Tensor,
    dcp_sharded: torch.Tensor,
    slot_mappings_ptr: torch.Tensor,
    slot_mappings_stride: int,
    cp_rank: int,
    CP_SIZE: int,
    CP_INTERLEAVE: int,
    PAD_ID: int,
    TRITON_BLOCK_SIZE: int,
) -> None:
    """Turn token positions into KV-cache slots, per KV group.

    Args:
        max_num_tokens: width of `slot_mappings_ptr`; the unused tail gets PAD_ID.
        idx_mapping: `[num_reqs]`, -1 for a row that owns no blocks.
        query_start_loc: int32 `[num_reqs + 1]`.
        pos: int64 `[tokens]`.
        block_table_ptrs: uint64 `[groups]`; block_table_strides: int64 `[groups]`.
        block_sizes: int32 `[groups]`; slot_mapping_enabled: bool `[groups]`.
        slot_mappings_ptr: int64 `[groups, max_num_tokens]`.

    Raises:
        NotImplementedError: context parallelism, which vLLM has no CPU path for.
    """
    if CP_SIZE != 1:
        raise NotImplementedError("context parallelism is not supported on CPU")
    _compute_slot_mappings(
        idx_mapping.numpy(),
        query_start_loc.numpy(),
        pos.numpy(),
        block_table_ptrs.numpy(),
        block_table_strides.numpy(),
        block_sizes.numpy(),
        slot_mapping_enabled.numpy(),
        slot_mappings_ptr.numpy(),
        PAD_ID,
    )


@_jit
def _compute_slot_mappings(  # type: ignore[no-untyped-def]
    slots,
    query_starts,
    positions,
    tables,
    strides,
    block_sizes,
    enabled,
    mappings,
    pad,
):
    num_reqs = slots.shape[0]
    for group in range(block_sizes.shape[0]):
        stride = strides[group]
        block_size = np.int64(block_sizes[group])
        for row in range(num_reqs):
            slot = slots[row]
            begin, end = query_starts[row], query_starts[row + 1]
            if slot < 0 or not enabled[group]:
                mappings[group, begin:end] = pad
                continue
            table = numba.carray(
                _as_pointer(tables[group]), (slot + 1, stride), np.int32
            )
            for token in range(begin, end):
                position = positions[token]
                block = np.int64(table[slot, position // block_size])
                mappings[group, token] = block * block_size + position % block_size
        mappings[group, query_starts[num_reqs] :] = pad


def _prepare_prefill_inputs_kernel(
    input_ids_ptr: torch.Tensor,
    next_prefill_tokens_ptr: torch.Tensor,
    next_prefill_tokens_stride: int,
    num_lookahead: int,
    idx_mapping_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    prefill_lens_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    BLOCK_SIZE: int,
    LOOKAHEAD_BLOCK: int,
) -> None:
    """Copy the scheduled tokens of requests that still prefill into the input.

    Args:
        input_ids_ptr: int32 `[max_num_tokens]`.
        next_prefill_tokens_ptr: int32 `[num_lookahead, max_num_reqs]`, gets the
            prompt tokens after this chunk, 0 past the prompt.
        idx_mapping_ptr: `[num_reqs]`; query_start_loc_ptr: int32 `[num_reqs + 1]`.
        all_token_ids_ptr: int32 `[max_num_reqs, max_model_len]`.
        prefill_lens_ptr, num_computed_tokens_ptr: int32 `[max_num_reqs]`.
    """
    _prepare_prefill_inputs(
        input_ids_ptr.numpy(),
        next_prefill_tokens_ptr.numpy(),
        idx_mapping_ptr.numpy(),
        query_start_loc_ptr.numpy(),
        all_token_ids_ptr.numpy(),
        prefill_lens_ptr.numpy(),
        num_computed_tokens_ptr.numpy(),
    )


@_jit
def _prepare_prefill_inputs(  # type: ignore[no-untyped-def]
    input_ids, lookahead, slots, query_starts, token_ids, prefill_lens, computed
):
    width = token_ids.shape[1]
    for row in range(slots.shape[0]):
        slot = slots[row]
        if computed[slot] >= prefill_lens[slot]:
            continue
        begin, end = query_starts[row], query_starts[row + 1]
        shift = computed[slot] - begin
        # A canvas after the prompt's tail may reach past the row; its tokens are
        # written over what is copied here.
        for token in range(begin, min(end, width - shift)):
            input_ids[token] = token_ids[slot, token + shift]
        for ahead in range(lookahead.shape[0]):
            position = end + shift + ahead
            known = position < prefill_lens[slot]
            lookahead[ahead, slot] = token_ids[slot, position] if known else 0


def _prepare_pos_seq_lens_kernel(
    pos_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    max_num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """Positions of the scheduled tokens, and sequence lengths, 0 for unused rows.

    Args:
        pos_ptr: int64 `[max_num_tokens]`; seq_lens_ptr: int32 `[max_num_reqs]`.
        idx_mapping_ptr: `[num_reqs]`; query_start_loc_ptr: int32 `[num_reqs + 1]`.
        num_computed_tokens_ptr: int32 `[max_num_reqs]`.
    """
    _prepare_pos_seq_lens(
        pos_ptr.numpy(),
        seq_lens_ptr.numpy(),
        idx_mapping_ptr.numpy(),
        query_start_loc_ptr.numpy(),
        num_computed_tokens_ptr.numpy(),
    )


@_jit
def _prepare_pos_seq_lens(positions, seq_lens, slots, query_starts, computed):  # type: ignore[no-untyped-def]
    num_reqs = slots.shape[0]
    for row in range(num_reqs):
        begin, end = query_starts[row], query_starts[row + 1]
        done = computed[slots[row]]
        seq_lens[row] = done + end - begin
        for token in range(begin, end):
            positions[token] = done + token - begin
    seq_lens[num_reqs:] = 0


def _combine_sampled_and_draft_tokens_kernel(
    input_ids_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    last_sampled_tokens_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
    draft_tokens_ptr: torch.Tensor,
    draft_tokens_stride: int,
    cu_num_logits_ptr: torch.Tensor,
    logits_indices_ptr: torch.Tensor,
    BLOCK_SIZE: int,
    NUM_NEW_SAMPLED_TOKENS: int = 1,
) -> None:
    """Put the last sampled token and the drafts into the input; index logit rows.

    Args:
        input_ids_ptr: int32 `[max_num_tokens]`; idx_mapping_ptr: `[num_reqs]`.
        last_sampled_tokens_ptr: int64 `[max_num_reqs, 1]`.
        query_start_loc_ptr: int32 `[num_reqs + 1]`; seq_lens_ptr: int32 `[num_reqs]`.
        prefill_len_ptr: int32 `[max_num_reqs]`.
        draft_tokens_ptr: int64 `[max_num_reqs, drafts]`.
        cu_num_logits_ptr: int32 `[num_reqs + 1]`.
        logits_indices_ptr: int64 `[logits]`, written.
    """
    _combine_sampled_and_draft_tokens(
        input_ids_ptr.numpy(),
        idx_mapping_ptr.numpy(),
        last_sampled_tokens_ptr.view(-1).numpy(),
        query_start_loc_ptr.numpy(),
        seq_lens_ptr.numpy(),
        prefill_len_ptr.numpy(),
        draft_tokens_ptr.numpy(),
        cu_num_logits_ptr.numpy(),
        logits_indices_ptr.numpy(),
        NUM_NEW_SAMPLED_TOKENS,
    )


@_jit
def _combine_sampled_and_draft_tokens(  # type: ignore[no-untyped-def]
    input_ids,
    slots,
    last_sampled,
    query_starts,
    seq_lens,
    prefill_lens,
    drafts,
    logit_starts,
    logits_indices,
    num_new_sampled,
):
    for row in range(slots.shape[0]):
        slot = slots[row]
        begin, end = logit_starts[row], logit_starts[row + 1]
        num_logits = end - begin
        num_drafts = num_logits - num_new_sampled
        query_end = query_starts[row + 1]
        for i in range(num_logits):
            logits_indices[begin + i] = query_end - num_logits + i
        if seq_lens[row] <= prefill_lens[slot]:
            continue  # a prompt chunk
        # The rows of a prompt's tail keep their prompt tokens.
        first_logit = seq_lens[row] - num_logits
        if num_new_sampled > 0 and first_logit >= prefill_lens[slot]:
            input_ids[query_end - num_logits] = last_sampled[slot]
        for i in range(num_drafts):
            input_ids[query_end - num_drafts + i] = drafts[slot, i]


def _expand_idx_mapping_kernel(
    idx_mapping_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    BLOCK_SIZE: int,
) -> None:
    """The request slot of each logit row, and the row's place in its request.

    Args:
        idx_mapping_ptr: `[num_reqs]`; cu_num_logits_ptr: int32 `[num_reqs + 1]`.
        expanded_idx_mapping_ptr: `[logits]`, written.
        expanded_local_pos_ptr: int32 `[logits]`, written.
    """
    _expand_idx_mapping(
        idx_mapping_ptr.numpy(),
        expanded_idx_mapping_ptr.numpy(),
        expanded_local_pos_ptr.numpy(),
        cu_num_logits_ptr.numpy(),
    )


@_jit
def _expand_idx_mapping(slots, expanded, local_positions, logit_starts):  # type: ignore[no-untyped-def]
    for row in range(slots.shape[0]):
        begin = logit_starts[row]
        for logit in range(begin, logit_starts[row + 1]):
            expanded[logit] = slots[row]
            local_positions[logit] = logit - begin


def _get_num_sampled_and_rejected_kernel(
    num_sampled_ptr: torch.Tensor,
    num_rejected_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
) -> None:
    """Count a step's sampled and rejected rows; none for a prompt chunk.

    Args:
        num_sampled_ptr: int `[num_reqs]`, zeroed in place for prompt chunks.
        num_rejected_ptr: int `[num_reqs]`, written.
        seq_lens_ptr: int32 `[num_reqs]`; cu_num_logits_ptr: int32 `[num_reqs + 1]`.
        idx_mapping_ptr: `[num_reqs]`; prefill_len_ptr: int32 `[max_num_reqs]`.
    """
    _get_num_sampled_and_rejected(
        num_sampled_ptr.numpy(),
        num_rejected_ptr.numpy(),
        seq_lens_ptr.numpy(),
        cu_num_logits_ptr.numpy(),
        idx_mapping_ptr.numpy(),
        prefill_len_ptr.numpy(),
    )


@_jit
def _get_num_sampled_and_rejected(  # type: ignore[no-untyped-def]
    sampled, rejected, seq_lens, logit_starts, slots, prefill_lens
):
    for row in range(slots.shape[0]):
        if seq_lens[row] < prefill_lens[slots[row]]:
            sampled[row] = 0
            rejected[row] = 0
        else:
            num_logits = logit_starts[row + 1] - logit_starts[row]
            rejected[row] = num_logits - sampled[row]


def _post_update_kernel(
    idx_mapping_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    last_sampled_tokens_ptr: torch.Tensor,
    output_bin_counts_ptr: torch.Tensor | None,
    output_bin_counts_stride: int,
    sampled_tokens_ptr: torch.Tensor,
    sampled_tokens_stride: int,
    num_sampled_ptr: torch.Tensor,
    num_rejected_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor | None,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    total_len_ptr: torch.Tensor,
    num_warps: int = 1,
) -> None:
    """Append sampled tokens to their requests and advance their counters.

    Args:
        idx_mapping_ptr: `[num_reqs]`, negative rows are skipped.
        num_computed_tokens_ptr, total_len_ptr: int32 `[max_num_reqs]`.
        last_sampled_tokens_ptr: int64 `[max_num_reqs, 1]`.
        output_bin_counts_ptr: int32 `[max_num_reqs, vocab]` or None.
        sampled_tokens_ptr: int64 `[num_reqs, width]`.
        num_sampled_ptr, num_rejected_ptr: int `[num_reqs]`.
        query_start_loc_ptr: int32 `[num_reqs + 1]`; None counts no query tokens.
        all_token_ids_ptr: int32 `[max_num_reqs, max_model_len]`.
        num_warps: a launch option of Triton's, unused.
    """
    counts = output_bin_counts_ptr
    starts = query_start_loc_ptr
    num_reqs = idx_mapping_ptr.shape[0]
    _post_update(
        idx_mapping_ptr.numpy(),
        num_computed_tokens_ptr.numpy(),
        last_sampled_tokens_ptr.view(-1).numpy(),
        _NO_ROWS if counts is None else counts.numpy(),
        sampled_tokens_ptr.numpy(),
        num_sampled_ptr.numpy(),
        num_rejected_ptr.numpy(),
        np.zeros(num_reqs + 1, np.int32) if starts is None else starts.numpy(),
        all_token_ids_ptr.numpy(),
        total_len_ptr.numpy(),
    )


@_jit
def _post_update(  # type: ignore[no-untyped-def]
    slots,
    computed,
    last_sampled,
    counts,
    sampled_tokens,
    num_sampled,
    num_rejected,
    query_starts,
    token_ids,
    total_lens,
):
    for row in range(slots.shape[0]):
        slot = slots[row]
        if slot < 0:
            continue
        for i in range(num_sampled[row]):
            token = sampled_tokens[row, i]
            token_ids[slot, total_lens[slot] + i] = token
            if counts.shape[0] > 0:
                counts[slot, token] += 1
            last_sampled[slot] = token
        total_lens[slot] += num_sampled[row]
        query_len = query_starts[row + 1] - query_starts[row]
        computed[slot] += query_len - num_rejected[row]


def _post_update_num_computed_tokens_kernel(
    idx_mapping_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
) -> None:
    """Count the whole query as computed: pipeline ranks that sample nothing.

    Args:
        idx_mapping_ptr: `[num_reqs]`; num_computed_tokens_ptr: int32 `[max_num_reqs]`.
        query_start_loc_ptr: int32 `[num_reqs + 1]`.
    """
    _post_update_num_computed_tokens(
        idx_mapping_ptr.numpy(),
        num_computed_tokens_ptr.numpy(),
        query_start_loc_ptr.numpy(),
    )


@_jit
def _post_update_num_computed_tokens(slots, computed, query_starts):  # type: ignore[no-untyped-def]
    for row in range(slots.shape[0]):
        computed[slots[row]] += query_starts[row + 1] - query_starts[row]


def _zero_kv_blocks_kernel(
    seg_addrs_ptr: torch.Tensor,
    seg_block_strides_ptr: torch.Tensor,
    seg_page_sizes_ptr: torch.Tensor,
    block_ids_ptr: torch.Tensor,
    BLOCK_SIZE: int,
) -> None:
    """Zero newly allocated KV-cache blocks, in units of four bytes.

    Args:
        seg_addrs_ptr: uint64 `[segments]`, addresses.
        seg_block_strides_ptr, seg_page_sizes_ptr: int64 `[segments]`.
        block_ids_ptr: int64 `[blocks]`.
    """
    _zero_kv_blocks(
        seg_addrs_ptr.numpy(),
        seg_block_strides_ptr.numpy(),
        seg_page_sizes_ptr.numpy(),
        block_ids_ptr.numpy(),
    )


@_jit
def _zero_kv_blocks(addresses, strides, page_sizes, block_ids):  # type: ignore[no-untyped-def]
    for segment in range(addresses.shape[0]):
        for block in block_ids:
            offset = np.uint64(block * strides[segment] * 4)
            page = numba.carray(
                _as_pointer(addresses[segment] + offset),
                (page_sizes[segment],),
                np.int32,
            )
            page[:] = 0


def _topk_log_softmax_kernel(
    output_ptr: torch.Tensor,
    logits_ptr: torch.Tensor,
    logits_stride: int,
    topk_ids_ptr: torch.Tensor,
    topk_ids_stride: int,
    topk: int,
    vocab_size: int,
    BLOCK_SIZE: int,
    TOPK_BLOCK_SIZE: int,
) -> None:
    """Log-probabilities of chosen tokens, in float32.

    Args:
        output_ptr: float32 `[rows, topk]`, written.
        logits_ptr: `[rows, vocab_size]`; topk_ids_ptr: int64 `[rows, topk]`.
    """
    for row in range(logits_ptr.shape[0]):  # one float32 row at a time
        logits = logits_ptr[row].float()
        chosen = logits[topk_ids_ptr[row]]
        torch.sub(chosen, logits.logsumexp(-1), out=output_ptr[row])


def _ranks_kernel(
    output_ptr: torch.Tensor,
    logits_ptr: torch.Tensor,
    logits_stride: int,
    token_ids_ptr: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """How many logits of the row reach the token's own; 1 is the best.

    Args:
        output_ptr: int64 `[rows]`, written.
        logits_ptr: `[rows, vocab_size]`; token_ids_ptr: int64 `[rows]`.
    """
    own = logits_ptr.gather(-1, token_ids_ptr.long().unsqueeze(-1))
    torch.sum(logits_ptr >= own, dim=-1, out=output_ptr)


def _fill_logprob_token_ids_kernel(
    out_token_ids_ptr: torch.Tensor,
    out_token_ids_stride: int,
    out_valid_mask_ptr: torch.Tensor,
    out_valid_mask_stride: int,
    sampled_token_ids_ptr: torch.Tensor,
    topk_indices_ptr: torch.Tensor,
    topk_indices_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    num_per_req_token_ids_ptr: torch.Tensor,
    per_req_token_ids_ptr: torch.Tensor,
    per_req_token_ids_stride: int,
    NUM_TOPK: int,
    PADDED_COLS: int,
) -> None:
    """The tokens to report of each row: the sampled one, then chosen or top ones.

    Args:
        out_token_ids_ptr: int64 `[rows, 1 + columns]`, zeros, written.
        out_valid_mask_ptr: bool, same shape, False, written.
        sampled_token_ids_ptr: int64 `[rows]`.
        topk_indices_ptr: int32 `[rows, NUM_TOPK]`, unused where NUM_TOPK is 0.
        expanded_idx_mapping_ptr: `[rows]`.
        num_per_req_token_ids_ptr: int32 `[max_num_reqs]`.
        per_req_token_ids_ptr: int32 `[max_num_reqs, most]`.
    """
    out_token_ids_ptr[:, 0] = sampled_token_ids_ptr
    out_valid_mask_ptr[:, 0] = True
    for row, slot in enumerate(expanded_idx_mapping_ptr.tolist()):
        count = int(num_per_req_token_ids_ptr[slot])
        tokens = per_req_token_ids_ptr[slot, :count]
        if count == 0:
            count = NUM_TOPK
            tokens = topk_indices_ptr[row, :count] if count else tokens
        out_token_ids_ptr[row, 1 : 1 + count] = tokens
        out_valid_mask_ptr[row, 1 : 1 + count] = True


def _prompt_logprobs_token_ids_kernel(
    prompt_logprobs_token_ids_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    BLOCK_SIZE: int,
) -> None:
    """The token after each query position, whose prompt log-probability is asked.

    Args:
        prompt_logprobs_token_ids_ptr: int64 `[tokens]`, written.
        query_start_loc_ptr: int32 `[num_reqs + 1]`; idx_mapping_ptr: `[num_reqs]`.
        num_computed_tokens_ptr: int32 `[max_num_reqs]`.
        all_token_ids_ptr: int32 `[max_num_reqs, max_model_len]`.
    """
    _prompt_logprobs_token_ids(
        prompt_logprobs_token_ids_ptr.numpy(),
        query_start_loc_ptr.numpy(),
        idx_mapping_ptr.numpy(),
        num_computed_tokens_ptr.numpy(),
        all_token_ids_ptr.numpy(),
    )


@_jit
def _prompt_logprobs_token_ids(output, query_starts, slots, computed, token_ids):  # type: ignore[no-untyped-def]
    for row in range(slots.shape[0]):
        slot = slots[row]
        shift = computed[slot] + 1 - query_starts[row]
        for token in range(query_starts[row], query_starts[row + 1]):
            position = token + shift
            known = position < token_ids.shape[1]
            output[token] = token_ids[slot, position] if known else 0


def _num_nans_kernel(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    num_nans_ptr: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Count the NaNs of each row of `[rows, vocab_size]` into int32 `[rows]`."""
    num_nans_ptr.copy_(logits_ptr.isnan().sum(-1))


def _apply_grammar_bitmask_kernel(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    logits_indices_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    bitmask_ptr: torch.Tensor,
    bitmask_stride: int,
    vocab_size: int,
    MASK_STRIDE: int,
    BLOCK_SIZE: int,
) -> None:
    """Set the logits of tokens that a grammar forbids to -inf, in place.

    Args:
        logits_ptr: `[logits, vocab_size]`.
        logits_indices_ptr: int32 `[masks]`, `row * MASK_STRIDE + place in the row`.
        cu_num_logits_ptr: int32 `[num_reqs + 1]`.
        bitmask_ptr: int32 `[masks, ceil(vocab_size / 32)]`, bit set = allowed.
    """
    rows, places = logits_indices_ptr // MASK_STRIDE, logits_indices_ptr % MASK_STRIDE
    starts = cu_num_logits_ptr[rows]
    bits = torch.arange(32, dtype=torch.int32)
    active = places < cu_num_logits_ptr[rows + 1] - starts
    for mask, logit in enumerate((starts + places).tolist()):
        if active[mask]:
            allowed = (bitmask_ptr[mask].unsqueeze(-1) >> bits).bitwise_and_(1)
            forbidden = allowed.view(-1)[:vocab_size] == 0
            logits_ptr[logit].masked_fill_(forbidden, -torch.inf)


_BY_MODULE: dict[str, tuple[Callable[..., None], ...]] = {
    "utils": (_zero_kv_blocks_kernel,),
    "gpu.buffer_utils": (_apply_write_kernel,),
    "gpu.block_table": (
        _gather_block_tables_kernel,
        _compute_slot_mappings_kernel,
    ),
    "gpu.input_batch": (
        _prepare_prefill_inputs_kernel,
        _prepare_pos_seq_lens_kernel,
        _combine_sampled_and_draft_tokens_kernel,
        _expand_idx_mapping_kernel,
        _get_num_sampled_and_rejected_kernel,
        _post_update_kernel,
        _post_update_num_computed_tokens_kernel,
    ),
    "gpu.metrics.logits": (_num_nans_kernel,),
    "gpu.sample.logprob": (
        _topk_log_softmax_kernel,
        _ranks_kernel,
        _fill_logprob_token_ids_kernel,
    ),
    "gpu.sample.prompt_logprob": (_prompt_logprobs_token_ids_kernel,),
    "gpu.structured_outputs": (_apply_grammar_bitmask_kernel,),
}

KERNELS: dict[str, Callable[..., None]] = {
    f"vllm.v1.worker.{module}.{kernel.__name__}": kernel
    for module, kernels in _BY_MODULE.items()
    for kernel in kernels
}
"""Full name of each replaced kernel and its replacement."""


@functools.cache
def register() -> None:
    """Route vLLM's launches to `KERNELS`, once per process; not where Triton works."""
    from vllm.triton_utils import HAS_TRITON
    from vllm.triton_utils.dispatcher import register_kernels

    if not HAS_TRITON:
        register_kernels(KERNELS)
