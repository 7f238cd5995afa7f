# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of a token and of the most probable ones, and the token's rank.

vLLM normalises all logits in float32 and sorts from that. Here the largest logits are
looked for in the dtype they come in, and only those found are normalised.
"""

from __future__ import annotations

import torch

from vllm_dlm.kernels import numba_rows
from vllm_dlm.kernels.shards import logit_of
from vllm_dlm.kernels.token_stats import row_slices, token_stats


def top_logprobs(
    logits: torch.Tensor,
    k: int,
    logsumexp: torch.Tensor | None,
    tokens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities as vLLM lays them out: column 0 is the row's own token.

    Args:
        logits: [N, V], floating point, of the whole vocabulary. NaN counts as -inf.
        k: how many of the most probable tokens, 0 to V.
        logsumexp: [N], `TokenStats.logsumexp` of these rows; None computes it.
        tokens: [N] int64.

    Returns:
        [N, k + 1] int64 ids, the most probable first; [N, k + 1] float32
        log-probabilities; [N] int64 rank of the token: how many tokens are at least
        as probable, so 1 for the best alone. Of equal logits, numba lists lower ids
        first; torch, on other devices, in any order.
    """
    num_rows, vocab = logits.shape
    if not 0 <= k <= vocab:
        raise ValueError(f"k={k} must be 0 to the vocabulary's size, {vocab}")
    if logsumexp is None:
        logsumexp = token_stats(logits).logsumexp
    chosen = logit_of(logits, tokens)
    chosen = torch.where(chosen.isnan(), -torch.inf, chosen)
    if num_rows == 0:
        columns = tokens.new_empty(0, k)
        ranks = tokens.new_empty(0)
    elif (
        logits.device.type == "cpu"
        and numba_rows.AVAILABLE
        and numba_rows.reads(logits)
    ):
        columns, ranks = numba_rows.largest_rows(logits, k, chosen.float())
    else:
        parts = [
            _reference(logits[part], k, chosen[part]) for part in row_slices(logits)
        ]
        columns, ranks = map(torch.cat, zip(*parts, strict=True))
    best = logits.gather(1, columns).double()
    values = torch.cat([chosen[:, None], best], dim=1) - logsumexp[:, None]
    # A row of -inf has no probabilities: inf - inf is nan.
    values = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return torch.cat([tokens[:, None], columns], dim=1), values.float(), ranks


def _reference(
    logits: torch.Tensor, k: int, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`numba_rows.largest_rows` in plain torch, with a copy of the logits."""
    logits = logits.masked_fill(logits.isnan(), -torch.inf)
    ranks = (logits >= chosen[:, None].to(logits.dtype)).sum(dim=1)
    return logits.topk(k, dim=1).indices, ranks
