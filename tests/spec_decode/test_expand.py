# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters of draft tokens on a CPU, where vLLM's own kernel loses them."""

from __future__ import annotations

import pytest
import torch
from spec_decode.harness import Engine
from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens


@pytest.mark.parametrize(
    ("values", "replaced"),
    [
        (torch.tensor([0.5, 0.0, 2.0]), torch.tensor([0.5, 1.0, 2.0])),
        (torch.tensor([0.9, 0.1, 1.0]), torch.tensor([0.9, 0.1, 1.0])),
        (torch.tensor([5, 0, 7], dtype=torch.int32), torch.tensor([5, 1, 7])),
        (torch.tensor([5, 0, 7]), torch.tensor([5, 1, 7])),
    ],
)
def test_each_draft_token_gets_its_requests_value(
    plain: Engine, values: torch.Tensor, replaced: torch.Tensor
):
    """`plain`: a worker has started, and with it the kernels are in place."""
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    # What was in this memory must not show.
    for _ in range(3):
        torch.full((5,), 77.0)
        found = expand_batch_to_tokens(values, ends, 5, 0, 1)
        assert found.dtype == values.dtype
        assert found.tolist() == replaced[[0, 0, 2, 2, 2]].tolist()
