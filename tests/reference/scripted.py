# SPDX-License-Identifier: Apache-2.0
"""A model that says what a test has written down, for the reference's loops."""

from __future__ import annotations

import torch
from reference.llada import KVStore
from reference.procedures import ReferenceResult, generate, static

MASK, EOS = 7, 6


class ScriptedModel:
    """Says the same (token, probability) for a position at every step."""

    mask_id, eos_id = MASK, EOS

    def __init__(self, script: list[tuple[int, float]]) -> None:
        self.script = script
        self.calls: list[tuple[int, int, int]] = []

    def new_store(self, length: int) -> KVStore:
        return KVStore([torch.zeros(length, 1, 1)], [torch.zeros(length, 1, 1)])

    def forward(self, input_ids, positions, store=None) -> torch.Tensor:
        length = 0 if store is None else len(store)
        self.calls.append((positions[0], positions[-1] + 1, length))
        rows = []
        for position in positions:
            token, probability = self.script[position]
            row = torch.full((8,), (1 - probability) / 7)
            row[token] = probability
            rows.append(row.log())
        return torch.stack(rows)


def scripted(script: list[tuple[int, float]], **options) -> ReferenceResult:
    options = {"gen_length": 4, "block_length": 4, "rule": static()} | options
    return generate(ScriptedModel(script), [], **options)
