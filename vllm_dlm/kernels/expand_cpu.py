# SPDX-License-Identifier: Apache-2.0
"""The kernel that gives each draft token its request's sampling parameters, on a CPU.

vLLM 0.32's own CPU version converts the output to int64 and writes into the copy, so
temperature, top-p (float32) and top-k (int32) of drafts are uninitialised memory:
speculative decoding at temperature > 0 samples from wrong distributions, and greedy
requests beside others are wrong too. Not where Triton works.
"""

from __future__ import annotations

import torch


def expand_kernel(
    output: torch.Tensor,
    input_val: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Repeat each request's value for each of its tokens, in place.

    Args:
        output: [tokens], written.
        input_val: [requests], of any type.
        cu_num_tokens: [requests], how many tokens end with each request.
        replace_from: a value that stands for `replace_to`.
        replace_to: what it stands for.
        MAX_NUM_TOKENS: of the launch, not needed here.
    """
    values = torch.where(input_val == replace_from, replace_to, input_val)
    ends = cu_num_tokens.long()
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    output.copy_(values.repeat_interleave(counts))
