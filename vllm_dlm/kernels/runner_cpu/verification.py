# SPDX-License-Identifier: Apache-2.0
"""Verification of drafts: token by token, against the probabilities they came from.

Row i of a request's logits judges its draft i; the row behind its last draft gives the
bonus token. Draft -1 is no draft, and is never accepted. What a draft was drawn from
stands in `draft_logits`, not yet divided by the temperature; without them a draft is
taken for certain. Block verification and watermarks are not replaced here.
"""

import torch

from vllm_dlm.kernels.runner_cpu.gumbel import acceptance_draws, best_tokens


def _gather_draft_sampled_kernel(
    draft_sampled_ptr: torch.Tensor,
    pos_ptr: torch.Tensor,
    input_ids_ptr: torch.Tensor,
    positions_ptr: torch.Tensor,
    logits_indices_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
    num_logits: int,
    BLOCK_SIZE: int,
) -> None:
    """Input and position of each row; -1 for what only fills up a prompt's tail.

    Args:
        draft_sampled_ptr: int32 `[logits]`, written; pos_ptr: int64, same.
        input_ids_ptr, positions_ptr: `[tokens]`; logits_indices_ptr: `[logits]`.
        expanded_idx_mapping_ptr, expanded_local_pos_ptr: `[logits]`.
        prefill_len_ptr: int32 `[max_num_reqs]`.
    """
    positions = positions_ptr[logits_indices_ptr]
    places = expanded_local_pos_ptr
    prefill_lens = prefill_len_ptr[expanded_idx_mapping_ptr]
    fills = (places > 0) & (positions - places < prefill_lens)
    draft_sampled_ptr.copy_(input_ids_ptr[logits_indices_ptr].masked_fill(fills, -1))
    pos_ptr.copy_(positions)


def _flatten_sampled_kernel(
    flat_sampled_ptr: torch.Tensor,
    sampled_ptr: torch.Tensor,
    sampled_stride: int,
    num_sampled_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    num_warps: int = 1,
) -> None:
    """Put each request's sampled tokens at its first rows of logits.

    Args:
        flat_sampled_ptr: `[logits]`, written; sampled_ptr: `[num_reqs, most]`.
        num_sampled_ptr: `[num_reqs]`; cu_num_logits_ptr: int32 `[num_reqs + 1]`.
    """
    starts = cu_num_logits_ptr.tolist()
    for row, count in enumerate(num_sampled_ptr.tolist()):
        begin = starts[row]
        flat_sampled_ptr[begin : begin + count] = sampled_ptr[row, :count]


def _compute_local_logits_stats_kernel(
    target_local_argmax_ptr: torch.Tensor,
    target_local_argmax_stride: int,
    target_local_max_ptr: torch.Tensor,
    target_local_max_stride: int,
    target_local_sumexp_ptr: torch.Tensor,
    target_local_sumexp_stride: int,
    draft_local_max_ptr: torch.Tensor,
    draft_local_max_stride: int,
    draft_local_sumexp_ptr: torch.Tensor,
    draft_local_sumexp_stride: int,
    target_logits_ptr: torch.Tensor,
    target_logits_stride: int,
    draft_logits_ptr: torch.Tensor | None,
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    temp_ptr: torch.Tensor,
    vocab_size: int,
    num_speculative_steps: int = 0,
    num_logits: int = 0,
    BLOCK_SIZE: int = 0,
    HAS_DRAFT_LOGITS: bool = False,
) -> None:
    """Each block's best logit, and the sum of its exponentials, of rows with a draft.

    Args:
        target_local_*, draft_local_*: `[logits, blocks]`, written; the draft's of rows
            that sample, where HAS_DRAFT_LOGITS.
        target_logits_ptr: `[logits, >= vocab_size]`.
        draft_logits_ptr: `[max_num_reqs, num_speculative_steps, >= vocab_size]`.
        expanded_idx_mapping_ptr, expanded_local_pos_ptr: `[logits]`.
        temp_ptr: float32 `[max_num_reqs]`.
        num_speculative_steps: only vLLM 0.32; num_logits: only since 0.33; unused.
    """
    # The next row of a request's last one is at place 0, of another request.
    rows = expanded_local_pos_ptr[1:].nonzero()[:, 0]
    slots, places = expanded_idx_mapping_ptr[rows], expanded_local_pos_ptr[rows]
    temperatures = temp_ptr[slots]
    hot = temperatures != 0
    for block in range(target_local_max_ptr.shape[1]):
        columns = slice(block * BLOCK_SIZE, min((block + 1) * BLOCK_SIZE, vocab_size))
        best, argmax, total = _statistics(target_logits_ptr[rows, columns].float())
        target_local_argmax_ptr[rows, block] = argmax + columns.start
        target_local_max_ptr[rows, block] = best
        target_local_sumexp_ptr[rows, block] = total
        if HAS_DRAFT_LOGITS and draft_logits_ptr is not None:
            logits = draft_logits_ptr[slots[hot], places[hot].long(), columns].float()
            best, _, total = _statistics(logits / temperatures[hot, None])
            draft_local_max_ptr[rows[hot], block] = best
            draft_local_sumexp_ptr[rows[hot], block] = total


def _rejection_kernel(
    sampled_ptr: torch.Tensor,
    sampled_stride: int,
    rejected_steps_ptr: torch.Tensor,
    target_rejected_logsumexp_ptr: torch.Tensor,
    draft_rejected_logsumexp_ptr: torch.Tensor,
    target_logits_ptr: torch.Tensor,
    target_logits_stride: int,
    target_local_argmax_ptr: torch.Tensor,
    target_local_argmax_stride: int,
    target_local_max_ptr: torch.Tensor,
    target_local_max_stride: int,
    target_local_sumexp_ptr: torch.Tensor,
    target_local_sumexp_stride: int,
    draft_sampled_ptr: torch.Tensor,
    draft_logits_ptr: torch.Tensor | None,
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    draft_local_max_ptr: torch.Tensor,
    draft_local_max_stride: int,
    draft_local_sumexp_ptr: torch.Tensor,
    draft_local_sumexp_stride: int,
    cu_num_logits_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    temp_ptr: torch.Tensor,
    seed_ptr: torch.Tensor,
    pos_ptr: torch.Tensor,
    synthetic_conditional_rates_ptr: torch.Tensor | None,
    cumulative_log_p_ptr: torch.Tensor | None,
    local_residual_mass_ptr: torch.Tensor | None,
    local_residual_mass_stride: int,
    fly_entropy_ptr: torch.Tensor | None = None,
    fly_entropy_threshold: float = 0.0,
    vocab_num_blocks: int = 0,
    PADDED_VOCAB_NUM_BLOCKS: int = 0,
    HAS_DRAFT_LOGITS: bool = False,
    SYNTHETIC_MODE: bool = False,
    USE_BLOCK_VERIFICATION: bool = False,
    FLY_WINDOW_SIZE: int = 0,
    num_warps: int = 1,
) -> None:
    """How many drafts of each request are accepted, from its first on.

    A draft is accepted where p > u * q, u being `acceptance_draws`; greedily where the
    draft is the target's best token, which is written in place of the first that is
    not.

    Args:
        sampled_ptr: int64 `[num_reqs, drafts + 1]`, written up to the first rejection.
        rejected_steps_ptr: int32 `[num_reqs]`, written: accepted drafts.
        *_rejected_logsumexp_ptr: float32 `[num_reqs]`, written: of the rejected row.
        target_logits_ptr: `[logits, vocab]`; *_local_*: as the statistics above.
        draft_sampled_ptr: `[logits]`, the draft that row i judges stands at i + 1.
        draft_logits_ptr: `[max_num_reqs, drafts, vocab]` or None.
        cu_num_logits_ptr: int32 `[num_reqs + 1]`; idx_mapping_ptr: `[num_reqs]`.
        temp_ptr: float32, seed_ptr: int64 `[max_num_reqs]`; pos_ptr: `[logits]`.
        synthetic_conditional_rates_ptr: `[drafts]`, of acceptance, in SYNTHETIC_MODE.
        fly_*, FLY_WINDOW_SIZE: since vLLM 0.33.

    Raises:
        RuntimeError: block verification, or a window of "fly".
    """
    if USE_BLOCK_VERIFICATION or FLY_WINDOW_SIZE:
        raise RuntimeError(
            "rejection_sample_method 'block' and 'fly' need Triton, which this CPU "
            "build of vLLM lacks: leave the method out"
        )
    starts = cu_num_logits_ptr.long()
    counts = starts.diff() - 1
    owners = torch.arange(len(counts)).repeat_interleave(counts)
    places = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
    rows, slots = starts[owners] + places, idx_mapping_ptr[owners].long()
    drafts = draft_sampled_ptr[rows + 1].long()
    known, tokens = drafts >= 0, drafts.clamp(min=0)
    greedy = temp_ptr[slots] == 0
    best = target_local_max_ptr[rows].nan_to_num(nan=-torch.inf).argmax(1)
    argmax = target_local_argmax_ptr[rows, best]
    target_total = _logsumexp(target_local_max_ptr[rows], target_local_sumexp_ptr[rows])
    target = target_logits_ptr[rows, tokens].float() - target_total
    draft = draft_total = torch.zeros_like(target)
    if HAS_DRAFT_LOGITS and draft_logits_ptr is not None:
        draft_total = _logsumexp(
            draft_local_max_ptr[rows], draft_local_sumexp_ptr[rows]
        )
        draft = draft_logits_ptr[slots, places, tokens].float() / temp_ptr[slots]
        draft = draft - draft_total
    draws = acceptance_draws(seed_ptr[slots], pos_ptr[rows])
    accepted = torch.where(greedy, argmax == tokens, target > draws.log() + draft)
    if SYNTHETIC_MODE:
        assert synthetic_conditional_rates_ptr is not None
        accepted = draws < synthetic_conditional_rates_ptr[places]
    accepted &= known
    written = torch.where(greedy & ~accepted, argmax, tokens)
    sampled_ptr[owners, places] = written
    passes = accepted.tolist()
    row = 0
    for request, count in enumerate(counts.tolist()):
        length = next((i for i in range(count) if not passes[row + i]), count)
        rejected_steps_ptr[request] = length
        if length < count:
            target_rejected_logsumexp_ptr[request] = target_total[row + length]
            draft_rejected_logsumexp_ptr[request] = draft_total[row + length]
        row += count


def _resample_kernel(
    resampled_local_argmax_ptr: torch.Tensor,
    resampled_local_argmax_stride: int,
    resampled_local_max_ptr: torch.Tensor,
    resampled_local_max_stride: int,
    target_logits_ptr: torch.Tensor,
    target_logits_stride: int,
    target_rejected_logsumexp_ptr: torch.Tensor,
    draft_logits_ptr: torch.Tensor | None,
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    draft_rejected_logsumexp_ptr: torch.Tensor,
    rejected_step_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    draft_sampled_ptr: torch.Tensor,
    temp_ptr: torch.Tensor,
    seed_ptr: torch.Tensor,
    pos_ptr: torch.Tensor,
    cumulative_log_p_ptr: torch.Tensor | None,
    contexts_ptr: torch.Tensor | None,
    contexts_stride: int,
    watermarking_ptr: torch.Tensor | None,
    watermarking_skip_mask_ptr: torch.Tensor | None,
    watermark_key_0: int,
    watermark_key_1: int,
    vocab_size: int,
    BLOCK_SIZE: int,
    HAS_DRAFT_LOGITS: bool,
    USE_FP64: bool,
    USE_BLOCK_VERIFICATION: bool,
    CONTEXT_WIDTH: int,
    WATERMARK: bool,
    DEDUPLICATE_CONTEXTS: bool,
) -> None:
    """Draw the token behind the accepted drafts: best of each block of the vocabulary.

    From the target's distribution behind the last draft and for draft -1; else from
    what is left of it, max(p - q, 0), where q of a certain draft is 1.

    Args:
        resampled_local_argmax_ptr: int64 `[num_reqs, blocks]`, written;
            resampled_local_max_ptr: float, same. Not for greedy rejections, whose
            token stands already.
        others: as of the kernels above.
    """
    slots = expanded_idx_mapping_ptr[cu_num_logits_ptr[:-1].long()].long()
    rows = cu_num_logits_ptr[:-1].long() + rejected_step_ptr
    is_bonus = rows == cu_num_logits_ptr[1:] - 1
    temperatures = temp_ptr[slots]
    scores = target_logits_ptr[rows, :vocab_size].float()
    rejected = draft_sampled_ptr[torch.where(is_bonus, rows, rows + 1)].long()
    left = ~is_bonus & (rejected >= 0) & (temperatures != 0)
    if HAS_DRAFT_LOGITS and draft_logits_ptr is not None:
        of, places = slots[left], rejected_step_ptr[left].long()
        draft = draft_logits_ptr[of, places, :vocab_size].float()
        draft = draft / temperatures[left, None]
        draft -= draft_rejected_logsumexp_ptr[left, None]
        target = scores[left] - target_rejected_logsumexp_ptr[left, None]
        ratio = (draft - target).exp()
        residual = target + torch.log1p(-ratio.clamp(max=1))
        scores[left] = residual.masked_fill(~(ratio < 1), -torch.inf)
    else:
        scores[left, rejected[left]] = -torch.inf
    wanted = is_bonus | (temperatures != 0)
    shape = (int(wanted.sum()), resampled_local_max_ptr.shape[1])
    tokens = torch.empty(shape, dtype=torch.int64)
    best = torch.empty(shape, dtype=resampled_local_max_ptr.dtype)
    best_tokens(
        tokens,
        best,
        scores[wanted],
        slots[wanted],
        seed_ptr,
        pos_ptr[rows[wanted]],
        temp_ptr,
        BLOCK_SIZE,
    )
    resampled_local_argmax_ptr[wanted] = tokens
    resampled_local_max_ptr[wanted] = best


def _insert_resampled_kernel(
    sampled_ptr: torch.Tensor,
    sampled_stride: int,
    num_sampled_ptr: torch.Tensor,
    resampled_local_argmax_ptr: torch.Tensor,
    resampled_local_argmax_stride: int,
    resampled_local_max_ptr: torch.Tensor,
    resampled_local_max_stride: int,
    resample_num_blocks: int,
    cu_num_logits_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    temp_ptr: torch.Tensor,
    PADDED_RESAMPLE_NUM_BLOCKS: int,
) -> None:
    """Write the drawn token behind the accepted drafts, and count it.

    Args:
        sampled_ptr: int64 `[num_reqs, drafts + 1]`, written.
        num_sampled_ptr: int32 `[num_reqs]`, accepted drafts; one more afterwards.
        resampled_local_*: `[num_reqs, blocks]`, as `_resample_kernel` leaves them.
        cu_num_logits_ptr: int32 `[num_reqs + 1]`; expanded_idx_mapping_ptr: `[logits]`.
        temp_ptr: float32 `[max_num_reqs]`.
    """
    starts = cu_num_logits_ptr.long()
    slots = expanded_idx_mapping_ptr[starts[:-1]].long()
    is_bonus = starts[:-1] + num_sampled_ptr == starts[1:] - 1
    requests = (is_bonus | (temp_ptr[slots] != 0)).nonzero()[:, 0]
    scores = resampled_local_max_ptr[requests].nan_to_num(nan=-torch.inf)
    tokens = resampled_local_argmax_ptr[requests, scores.argmax(1)]
    sampled_ptr[requests, num_sampled_ptr[requests].long()] = tokens
    num_sampled_ptr += 1


def _statistics(
    logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[rows]` each: largest logit, its column, and the sum of exp(logit - largest)."""
    best, argmax = logits.max(dim=1)
    total = (logits - best[:, None]).exp().sum(dim=1)
    return best, argmax, total.masked_fill(best == -torch.inf, 0)


def _logsumexp(best: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """`[rows]`, over blocks `[rows, blocks]`."""
    largest = best.amax(dim=1, keepdim=True)
    return largest[:, 0] + (total * (best - largest).exp()).sum(dim=1).log()
