# SPDX-License-Identifier: Apache-2.0
"""What sampling parameters do to rows of logits before a token is drawn.

Rows may outnumber requests: behind drafts, row i of a request is at place i of it, and
the input of row j is its last token (place 0) or a draft.
"""

import math

import torch


def _temperature_kernel(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    temperature_ptr: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Divide each row by its request's temperature, in place; 0 leaves it as it is.

    Args:
        logits_ptr: `[rows, vocab_size]`; expanded_idx_mapping_ptr: `[rows]`.
        temperature_ptr: float32 `[max_num_reqs]`.
    """
    divisors = temperature_ptr[expanded_idx_mapping_ptr]
    divisors = torch.where(divisors == 0, 1.0, divisors)
    logits_ptr.copy_(logits_ptr.float().div_(divisors[:, None]))


def _min_p_kernel(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    min_p_ptr: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """-inf for tokens less probable than `min_p` times the best one, in place.

    Args:
        logits_ptr: `[rows, vocab_size]`; expanded_idx_mapping_ptr: `[rows]`.
        min_p_ptr: float32 `[max_num_reqs]`, 0 for none.
    """
    least = min_p_ptr[expanded_idx_mapping_ptr].log()  # -inf forbids nothing
    threshold = logits_ptr.amax(dim=1).float() + least
    logits_ptr.masked_fill_(logits_ptr < threshold[:, None], -torch.inf)


def _penalties_kernel(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    token_ids_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    repetition_penalty_ptr: torch.Tensor,
    frequency_penalty_ptr: torch.Tensor,
    presence_penalty_ptr: torch.Tensor,
    prompt_bin_mask_ptr: torch.Tensor,
    prompt_bin_mask_stride: int,
    output_bin_counts_ptr: torch.Tensor,
    output_bin_counts_stride: int,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Penalties of tokens that the text has, the row's drafts included, in place.

    Args:
        logits_ptr: `[rows, vocab_size]`; expanded_idx_mapping_ptr: `[rows]`.
        token_ids_ptr: `[rows]`, each row's input; -1 is no token.
        expanded_local_pos_ptr: int32 `[rows]`.
        repetition_penalty_ptr, frequency_penalty_ptr, presence_penalty_ptr: float32
            `[max_num_reqs]`; 1, 0 and 0 are none.
        prompt_bin_mask_ptr: int32 `[max_num_reqs, ceil(vocab_size / 32)]`, bits.
        output_bin_counts_ptr: int32 `[max_num_reqs, vocab_size]`.
    """
    slots, places = expanded_idx_mapping_ptr.tolist(), expanded_local_pos_ptr.tolist()
    for row, (slot, place) in enumerate(zip(slots, places, strict=True)):
        repetition = float(repetition_penalty_ptr[slot])
        frequency = float(frequency_penalty_ptr[slot])
        presence = float(presence_penalty_ptr[slot])
        if (repetition, frequency, presence) == (1, 0, 0):
            continue
        counts = output_bin_counts_ptr[slot].clone()
        drafts = token_ids_ptr[row - place + 1 : row + 1].long()
        drafts = drafts[drafts >= 0]
        counts.index_add_(0, drafts, torch.ones_like(drafts, dtype=counts.dtype))
        written = counts > 0
        logits = logits_ptr[row].float()
        if repetition != 1:
            seen = written | _bits(prompt_bin_mask_ptr[slot], vocab_size)
            scale = torch.where(logits > 0, 1 / repetition, repetition)
            logits = torch.where(seen, logits * scale, logits)
        logits_ptr[row] = logits - frequency * counts - presence * written


def _bincount_kernel(
    expanded_idx_mapping_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    prompt_len_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
    prompt_bin_mask_ptr: torch.Tensor,
    prompt_bin_mask_stride: int,
    output_bin_counts_ptr: torch.Tensor,
    output_bin_counts_stride: int,
    BLOCK_SIZE: int,
) -> None:
    """Which tokens new requests have in their prompts, and how often behind them.

    Args:
        expanded_idx_mapping_ptr: `[new requests]`.
        all_token_ids_ptr: int32 `[max_num_reqs, max_model_len]`.
        prompt_len_ptr, prefill_len_ptr: int32 `[max_num_reqs]`; behind the prompt
            stands what a preempted request has written.
        prompt_bin_mask_ptr: int32 `[max_num_reqs, words]`, zeros there, written.
        output_bin_counts_ptr: int32 `[max_num_reqs, vocab]`, zeros there, written.
    """
    shifts = torch.arange(32, dtype=torch.int64)
    for slot in expanded_idx_mapping_ptr.tolist():
        prompt_len, known = int(prompt_len_ptr[slot]), int(prefill_len_ptr[slot])
        mask, counts = prompt_bin_mask_ptr[slot], output_bin_counts_ptr[slot]
        tokens = all_token_ids_ptr[slot, :known].long()
        seen = torch.zeros(len(mask) * 32, dtype=torch.int64)
        seen[tokens[:prompt_len]] = 1
        mask.copy_((seen.view(-1, 32) << shifts).sum(1))  # the 32nd bit is the sign
        written = tokens[prompt_len:]
        counts.index_add_(0, written, torch.ones_like(written, dtype=counts.dtype))


def _bias_kernel(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    vocab_size: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    num_allowed_token_ids_ptr: torch.Tensor,
    allowed_token_ids_ptr: torch.Tensor,
    allowed_token_ids_stride: int,
    num_logit_bias_ptr: torch.Tensor,
    bias_token_ids_ptr: torch.Tensor,
    bias_token_ids_stride: int,
    bias_ptr: torch.Tensor,
    bias_stride: int,
    pos_ptr: torch.Tensor,
    min_lens_ptr: torch.Tensor,
    num_stop_token_ids_ptr: torch.Tensor,
    restore_when_all_masked_ptr: torch.Tensor,
    stop_token_ids_ptr: torch.Tensor,
    stop_token_ids_stride: int,
    BLOCK_SIZE: int,
    LOGITS_BLOCK_SIZE: int,
    CHECK_ALL_MASKED_ROWS: bool = False,
) -> None:
    """Allowed tokens, biases, and no end of text before the least length, in place.

    Args:
        logits_ptr: `[rows, vocab_size]`; expanded_idx_mapping_ptr: `[rows]`.
        num_allowed_token_ids_ptr, num_logit_bias_ptr, num_stop_token_ids_ptr: int32
            `[max_num_reqs]`, of allowed_token_ids_ptr, of bias_token_ids_ptr and
            bias_ptr, of stop_token_ids_ptr, all `[max_num_reqs, most]`.
        pos_ptr: `[rows]`, of each row's input; min_lens_ptr: int32 `[max_num_reqs]`,
            tokens with the prompt's.
        restore_when_all_masked_ptr: int32 `[max_num_reqs]`, whether a row that has
            nothing but stop tokens keeps them, where CHECK_ALL_MASKED_ROWS.
    """
    for row, slot in enumerate(expanded_idx_mapping_ptr.tolist()):
        logits = logits_ptr[row]
        if count := int(num_allowed_token_ids_ptr[slot]):
            allowed = allowed_token_ids_ptr[slot, :count].long()
            kept = logits[allowed]
            logits.fill_(-torch.inf)
            logits[allowed] = kept
        if count := int(num_logit_bias_ptr[slot]):
            tokens = bias_token_ids_ptr[slot, :count].long()
            logits[tokens] += bias_ptr[slot, :count].to(logits.dtype)
        count = int(num_stop_token_ids_ptr[slot])
        if count and int(pos_ptr[row]) + 1 < int(min_lens_ptr[slot]):
            stops = stop_token_ids_ptr[slot, :count].long()
            kept = logits[stops]
            logits[stops] = -torch.inf
            restores = CHECK_ALL_MASKED_ROWS and int(restore_when_all_masked_ptr[slot])
            if restores and float(logits.max()) == -math.inf:
                logits[stops] = torch.where(kept.isfinite(), kept, -torch.inf)


def _bad_words_kernel(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    bad_word_token_ids_ptr: torch.Tensor,
    bad_word_token_ids_stride: int,
    bad_word_offsets_ptr: torch.Tensor,
    bad_word_offsets_stride: int,
    num_bad_words_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    prompt_len_ptr: torch.Tensor,
    total_len_ptr: torch.Tensor,
    input_ids_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
) -> None:
    """-inf for the last token of a word whose others end the row's text, in place.

    Args:
        logits_ptr: `[rows, vocab_size]`; expanded_idx_mapping_ptr: `[rows]`.
        bad_word_token_ids_ptr: int32 `[max_num_reqs, most]`, cut into words by
            bad_word_offsets_ptr, int32 `[max_num_reqs, words + 1]`.
        num_bad_words_ptr, prompt_len_ptr, total_len_ptr: int32 `[max_num_reqs]`.
        all_token_ids_ptr: int32 `[max_num_reqs, max_model_len]`.
        input_ids_ptr: `[rows]`, each row's input; expanded_local_pos_ptr: the same.
    """
    slots, places = expanded_idx_mapping_ptr.tolist(), expanded_local_pos_ptr.tolist()
    for row, (slot, place) in enumerate(zip(slots, places, strict=True)):
        if not (count := int(num_bad_words_ptr[slot])):
            continue
        begin, end = int(prompt_len_ptr[slot]), int(total_len_ptr[slot])
        text = all_token_ids_ptr[slot, begin:end].tolist()
        text += input_ids_ptr[row - place + 1 : row + 1].tolist()
        offsets = bad_word_offsets_ptr[slot, : count + 1].tolist()
        tokens = bad_word_token_ids_ptr[slot, : offsets[-1]].tolist()
        for first, last in zip(offsets, offsets[1:], strict=False):
            prefix = tokens[first : last - 1]
            if len(prefix) <= len(text) and text[len(text) - len(prefix) :] == prefix:
                logits_ptr[row, tokens[last - 1]] = -torch.inf


def _bits(words: torch.Tensor, count: int) -> torch.Tensor:
    """Bool `[count]`: the bits of int32 words, the lowest first."""
    shifts = torch.arange(32, dtype=torch.int32)
    bits = (words[:, None] >> shifts).bitwise_and_(1)
    return bits.view(-1)[:count].bool()
