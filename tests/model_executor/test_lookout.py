# SPDX-License-Identifier: Apache-2.0
"""Lookout: what rows right of the active blocks say, in any company."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_dlm.config.cache import FAR
from vllm_dlm.model_executor.planning.lookout_rows import HostLookoutRows, LookoutRows
from vllm_dlm.model_executor.sampling.candidates import Candidates
from vllm_dlm.model_executor.sampling.choice import Choice
from vllm_dlm.model_executor.sampling.growth import in_units
from vllm_dlm.model_executor.sampling.lookout import Lookout
from vllm_dlm.model_executor.slots import RequestSlots

CPU = torch.device("cpu")
SLOTS, LENGTH, END = 5, 64, 7


def make() -> tuple[RequestSlots, Lookout]:
    table = RequestSlots(SLOTS, LENGTH, 0, CPU)
    facts: Any = SimpleNamespace(vocab_size=10, max_model_len=LENGTH, device=CPU)
    table.stop_ids[:, 0] = END
    table.prompt_len[:] = 4
    table.min_tokens[:] = torch.tensor([0, 0, 20, 0, 0, 0])
    table.eotp_threshold[:] = torch.tensor([0.5, 0.9, 0.5, 2.0, 0.5, 0.5])
    table.growth_window[:] = torch.tensor([0, 3, 8, 1, 30, 0])
    return table, Lookout(table, Candidates(table, facts))


def choice_of(tokens: list[int], confidence: list[float]) -> Choice:
    room = Choice.room_for(len(tokens), CPU)
    return room._replace(
        candidate=torch.tensor(tokens), confidence=torch.tensor(confidence)
    )


@given(seed=st.integers(0, 2**20))
def test_agrees_with_plain_loops_whoever_else_is_there(seed: int):
    generator = torch.Generator().manual_seed(seed)
    rows: dict[int, list[tuple[int, int, float]]] = {}
    for slot in torch.randperm(SLOTS, generator=generator)[:3].tolist():
        count = int(torch.randint(1, 30, (1,), generator=generator))
        draw = torch.rand(2, count, generator=generator)
        tokens = [END if is_end < 0.4 else 1 for is_end in draw[0]]
        rows[slot] = [
            (12 + i, token, float(sure))
            for i, (token, sure) in enumerate(zip(tokens, draw[1], strict=True))
        ]
    table, lookout = make()
    for present in (rows, *({slot: its} for slot, its in rows.items()), {}):
        flat = [(slot, *row) for slot, its in present.items() for row in its]
        slots, positions, tokens, sure = zip(*flat, strict=True) if flat else [()] * 4
        seen = LookoutRows(
            torch.tensor(slots, dtype=torch.int32),
            torch.tensor(positions, dtype=torch.int32),
        )
        # Rows of the blocks come first, and are not looked at.
        choice = choice_of([END, *tokens], [1.0, *sure])
        lookout.look(seen if flat else None, choice)
        for slot in range(SLOTS + 1):
            assert (
                int(table.lookout_end[slot]),
                table.lookout_counts[slot].tolist(),
            ) == expected(table, slot, present.get(slot, []))


def expected(
    table: RequestSlots, slot: int, rows: list[tuple[int, int, float]]
) -> tuple[int, list[int]]:
    early = int(table.prompt_len[slot] + table.min_tokens[slot])
    threshold, window = table.eotp_threshold[slot], int(table.growth_window[slot])
    ends = [
        (position, torch.tensor(sure))
        for position, token, sure in rows
        if token == END and position >= early
    ]
    first = min((position for position, c in ends if c >= threshold), default=FAR)
    counted = ends[-window:] if window else []
    total = sum(int(in_units(sure)) for _, sure in counted)
    return first, [len(ends), total, len(rows)]


def test_rows_of_requests_follow_each_other():
    rows = HostLookoutRows.of(
        np.array([3, 1, 2]),
        starts=np.array([8, 20, 9]),
        ends=np.array([11, 18, 10]),
        first_rows=np.array([0, 11, 40]),
        shift=1,
    )
    assert rows.slots.tolist() == [3, 3, 3, 2]
    assert rows.positions.tolist() == [9, 10, 11, 10]
    assert rows.rows.tolist() == [8, 9, 10, 49]
