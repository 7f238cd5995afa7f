# SPDX-License-Identifier: Apache-2.0
"""The rows that llada-forms learns from: prompt, canvas with holes, padding."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_dlm.tasks.forms.problems import draw_problem
from vllm_dlm.tasks.forms.rows import encode_row
from vllm_dlm.tasks.forms.vocabulary import EOS_ID, MASK_ID

if TYPE_CHECKING:
    from vllm_dlm.training.tiny.masking import Batch

# Token budget of a batch: short rows come in larger batches.
BATCH_TOKENS = 2048
# Length of rows -> share of the batches.
ROWS = {64: 22, 80: 22, 96: 20, 112: 10, 144: 12, 208: 7, 320: 3, 512: 2}
# What is behind a text's end hardly counts, as in llada-tiny.
PADDING_WEIGHT = 0.05


def make_batch(step: int, seed: int) -> Batch:
    """What a step learns from; the same for the same arguments."""
    import torch

    from vllm_dlm.training.tiny.masking import mask_canvas

    rng = random.Random(f"llada-forms-{seed}-{step}")
    [length] = rng.choices(list(ROWS), weights=list(ROWS.values()))
    num_rows = BATCH_TOKENS // length
    ids = torch.full((num_rows, length), EOS_ID)
    in_canvas = torch.zeros(num_rows, length, dtype=torch.bool)
    in_padding = torch.zeros_like(in_canvas)
    valid = torch.zeros_like(in_canvas)
    for index in range(num_rows):
        while True:
            problem = draw_problem(rng)
            row = encode_row(problem, rng)
            if len(row) <= length:
                break
        if problem.open_end and problem.pieces[-1].is_hole:
            row = row.widen(length)
        start = len(row.prompt)
        ids[index, : len(row)] = torch.tensor(row.prompt + row.canvas)
        in_canvas[index, start : len(row)] = torch.tensor(row.hole)
        in_padding[index, start : len(row)] = torch.tensor(row.padding)
        valid[index, : len(row)] = True
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    batch = mask_canvas(ids, in_canvas, in_padding, PADDING_WEIGHT, MASK_ID, generator)
    return replace(batch, valid=valid)
