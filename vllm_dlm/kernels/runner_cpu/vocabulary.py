# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities, ranks, NaNs and grammars: rows over the vocabulary."""

import torch

from vllm_dlm.kernels.numba_jit import jit

_jit = jit()


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
