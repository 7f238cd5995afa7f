# SPDX-License-Identifier: Apache-2.0
"""A step's inputs: tokens, positions, lengths; and what its outcome changes."""

import numpy as np
import torch

from vllm_dlm.kernels.numba_jit import jit

_jit = jit()

_NO_ROWS = np.empty((0, 0), dtype=np.int32)


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
    draft_tokens_ptr: torch.Tensor | None = None,
    draft_tokens_out_ptr: torch.Tensor | None = None,
    num_draft_tokens: int = 0,
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
        draft_tokens_ptr: `[num_reqs, num_draft_tokens]` or None, as in vLLM 0.32.
        draft_tokens_out_ptr: `[max_num_reqs, num_draft_tokens]`, gets the drafts of
            each request in its row.
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
    if draft_tokens_ptr is not None and draft_tokens_out_ptr is not None:
        kept = idx_mapping_ptr >= 0
        draft_tokens_out_ptr[idx_mapping_ptr[kept]] = draft_tokens_ptr[kept]


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
