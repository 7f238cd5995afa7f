# SPDX-License-Identifier: Apache-2.0
"""Experts that LLaDA2.2 chooses for a block before it does for a row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import write

from vllm_dlm.model_executor.models.llada2 import blocks_of_rows, experts_in_blocks


def test_blocks_of_the_rows_of_several_requests():
    """Two blocks, one of the next request, a cut one, one repeated, and padding."""
    rows = [*range(8, 24), *range(8), *range(16, 19), *range(16, 24), 0, 0]
    wanted = [0] * 8 + [1] * 8 + [2] * 8 + [3] * 3 + [4] * 8 + [5, 6]
    assert blocks_of_rows(torch.tensor(rows), 8).tolist() == wanted
    assert blocks_of_rows(torch.tensor([3, 4, 8]), 8).tolist() == [0, 0, 1]
    assert blocks_of_rows(torch.zeros(0, dtype=torch.int64), 8).tolist() == []


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(3, 12))
def test_experts_by_plain_lists(seed, blocks, capacity):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 5, (blocks,), generator=generator).tolist()
    block_of_row = [b for b, size in enumerate(sizes) for _ in range(size)]
    scores = torch.rand(len(block_of_row), 12, generator=generator) - 0.5
    chosen = experts_in_blocks(scores, torch.tensor(block_of_row), capacity, 3)
    for row, block in enumerate(block_of_row):
        own = [scores[r].tolist() for r, b in enumerate(block_of_row) if b == block]
        highest = [max(column) for column in zip(*own, strict=True)]
        admitted = sorted(range(12), key=highest.__getitem__)[-capacity:]
        best = sorted(admitted, key=scores[row].tolist().__getitem__)[-3:]
        assert chosen[row].nonzero().flatten().tolist() == sorted(best)


def test_blocks_of_another_length_are_refused(build, tmp_path):
    folder = write("llada2_2", tmp_path, dlm_block_length=12)
    with pytest.raises(ValueError, match=r"--dlm-block-length 12 is no multiple of 8"):
        build(folder)
