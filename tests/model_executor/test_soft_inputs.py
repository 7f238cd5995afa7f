# SPDX-License-Identifier: Apache-2.0
"""Input embeddings of a forward: the laws, and which rows stay hard."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import nn

from vllm_dlm.model_executor.sampling.groups import Group
from vllm_dlm.model_executor.sampling.soft_memory import (
    IDS,
    MIXTURES,
    WEIGHTS,
    WHERE,
    soft_fields,
)
from vllm_dlm.model_executor.slots import RequestSlots
from vllm_dlm.model_executor.soft_inputs import InputEmbeddings
from vllm_dlm.strategies.base import (
    AnyParams,
    Context,
    Params,
    SoftInputs,
    Strategy,
)

CPU = torch.device("cpu")
B, H, MASK = 4, 3, 9
SEAT, START, ROWS = 2, 8, 6
"""The request's seat and active block; its rows are the positions 6 to 11."""


class Embeds(nn.Module):
    """Ten tokens."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(10, H, generator=draw), False)

    def embed_input_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids.long()]


class Conditioned(Embeds):
    """A model that has a law of its own."""

    def condition(self, own: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
        return 2 * own + soft


class Forward:
    """One request's forward, the step after a decision."""

    def __init__(self, inputs: SoftInputs, model: Embeds, step: int = 1) -> None:
        class Rule(Strategy):
            name = "rule"

            @classmethod
            def soft(cls, params: AnyParams) -> SoftInputs:
                return inputs

        self.model, self.slots = model, RequestSlots(1, 16, MASK, CPU)
        self.slots.block_start[0], self.slots.step[0] = START, step
        self.slots.seat[0] = SEAT
        rule = Rule(Params(), B, Context(CPU, ""))
        fields = soft_fields(inputs, B, H, torch.float32)
        self.group = Group(rule, 0, fields)
        self.group.memory = self.group._rows(SEAT + 1)
        self.ids = torch.tensor([1, 2, 3, MASK, MASK, 4])
        self.positions = torch.arange(6, 12)

    def remember(self, **fields: Any) -> None:
        names = {"where": WHERE, "weights": WEIGHTS, "ids": IDS, "mixtures": MIXTURES}
        for name, value in fields.items():
            self.group.memory[names[name]][SEAT] = torch.as_tensor(value)

    def inputs(self, rows: list[int]) -> torch.Tensor:
        """What the forward's rows are fed.

        Args:
            rows: that the plan names.
        """
        facts: Any = SimpleNamespace(
            max_num_tokens=8,
            device=CPU,
            model_config=SimpleNamespace(
                dtype=torch.float32, get_inputs_embeds_size=lambda: H
            ),
        )
        blocks = SimpleNamespace(canvas_rows=torch.tensor(rows), width=B)
        plan: Any = SimpleNamespace(
            groups=[blocks], row_slots=torch.zeros(ROWS, dtype=torch.int32)
        )
        embeddings = InputEmbeddings(self.model, self.slots, facts)
        first = embeddings.of_dummy(8)
        made = embeddings.of(plan, self.ids, self.positions, lambda _: self.group, 8)
        # A captured graph reads what it was captured with.
        assert made.data_ptr() == first.data_ptr() and made.shape == first.shape
        return made[:ROWS]


CANVAS = [2, 3, 4, 5]
WHERE_SOFT = [False, True, False, True]


@pytest.mark.parametrize("law", ["add", "replace"])
@pytest.mark.parametrize("rows", [CANVAS, list(range(ROWS))])
def test_of_all_tokens(law: Literal["add", "replace"], rows: list[int]):
    """Also where the plan names rows left of the block."""
    forward = Forward(SoftInputs("full", law), Embeds())
    mixtures = torch.arange(B * H).view(B, H).float()
    weights = torch.full((B, 1), 0.5)
    forward.remember(where=WHERE_SOFT, weights=weights, mixtures=mixtures)
    hard = forward.model.embed_input_ids(forward.ids)
    wanted = hard.clone()
    for row, at in ((3, 1), (5, 3)):
        wanted[row] = mixtures[at] / 2 + (hard[row] if law == "add" else 0)
    torch.testing.assert_close(forward.inputs(rows), wanted)


@pytest.mark.parametrize("keeps_norm", [False, True])
def test_of_some_tokens(keeps_norm: bool):
    inputs = SoftInputs("top", "replace", 2, keeps_norm)
    forward = Forward(inputs, Embeds())
    ids = torch.tensor([[5, MASK]] * B)
    forward.remember(where=WHERE_SOFT, weights=torch.tensor([[0.6, 0.4]] * B), ids=ids)
    token, mask = forward.model.weight[5], forward.model.weight[MASK]
    mixture = 0.6 * token + 0.4 * mask
    if keeps_norm:
        mixture *= (0.6 * token.norm() + 0.4 * mask.norm()) / (mixture.norm() + 1e-6)
    wanted = forward.model.embed_input_ids(forward.ids)
    wanted[[3, 5]] = mixture
    torch.testing.assert_close(forward.inputs(CANVAS), wanted)


def test_a_blocks_first_step_is_hard():
    """Whatever the step before, of another block or request, has left."""
    forward = Forward(SoftInputs("top", "replace", 1), Embeds(), step=0)
    ids, ones = torch.full((B, 1), 5), torch.ones(B, 1)
    forward.remember(where=[True] * B, weights=ones, ids=ids)
    hard = forward.model.embed_input_ids(forward.ids)
    assert torch.equal(forward.inputs(CANVAS), hard)


def test_broken_mixtures_leave_their_rows_hard():
    forward = Forward(SoftInputs("full", "add"), Embeds())
    mixtures = torch.ones(B, H)
    mixtures[1, 2] = torch.nan
    forward.remember(where=WHERE_SOFT, weights=torch.ones(B, 1), mixtures=mixtures)
    wanted = forward.model.embed_input_ids(forward.ids)
    wanted[5] += 1
    torch.testing.assert_close(forward.inputs(CANVAS), wanted)


@pytest.mark.parametrize("step", [0, 1])
def test_a_models_own_law_takes_all_of_the_block(step: int):
    forward = Forward(SoftInputs("full", "condition"), Conditioned(), step)
    mixtures = torch.arange(B * H).view(B, H).float()
    forward.remember(where=WHERE_SOFT, weights=torch.ones(B, 1), mixtures=mixtures)
    wanted = forward.model.embed_input_ids(forward.ids)
    wanted[2:] *= 2
    if step:
        wanted[[3, 5]] += mixtures[[1, 3]]
    torch.testing.assert_close(forward.inputs(list(range(ROWS))), wanted)
