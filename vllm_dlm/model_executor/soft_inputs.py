# SPDX-License-Identifier: Apache-2.0
"""InputEmbeddings: what each forward is fed, where mixtures of tokens may be.

Engines of models that declare `dlm_soft_inputs`, and servers with `--dlm-soft-inputs`,
make the embeddings of a forward's rows themselves. They lie in one memory: a compiled
or captured network reads the same addresses in every forward, dummy ones included.

Rows of active blocks may be soft, by what their strategies decided in the step before
(`sampling/soft_memory.py`):

    law          input of a soft row, of its token's embedding e and the mixture m
    add          e + m
    replace      m
    condition    the model's own `condition(e, m)`, on all rows of active blocks, with
                 m = 0 where there is none

A row whose keys and values become final is not soft: rows left of an active block never
are, and a finished block is computed once more, with the first step of the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from vllm_dlm.model_executor.sampling.soft_memory import IDS, MIXTURES, WEIGHTS, WHERE

if TYPE_CHECKING:
    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.planning.block_rows import BlockRows
    from vllm_dlm.model_executor.planning.step_plan import SegmentPlan
    from vllm_dlm.model_executor.sampling.groups import Group
    from vllm_dlm.model_executor.slots import RequestSlots
    from vllm_dlm.strategies.base import SoftInputs

_TINY = 1e-6
"""Added to a length that is divided by."""


class InputEmbeddings:
    """Makes the input embeddings of each forward; see the module docstring.

    Args:
        model: has vLLM's `embed_input_ids`; and `condition`, if that is its law.
    """

    def __init__(
        self, model: torch.nn.Module, slots: RequestSlots, facts: EngineFacts
    ) -> None:
        self._embed: Callable[[torch.Tensor], torch.Tensor] = model.embed_input_ids  # type: ignore[assignment]
        condition: Any = getattr(model, "condition", None)
        self._condition: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = (
            condition
        )
        self._slots = slots
        size = facts.model_config.get_inputs_embeds_size()
        self._rows = torch.zeros(
            facts.max_num_tokens,
            size,
            dtype=facts.model_config.dtype,
            device=facts.device,
        )

    def of_dummy(self, num_rows: int) -> torch.Tensor:
        """[num_rows, H]: for a forward of which nothing is read."""
        return self._rows[:num_rows]

    def of(
        self,
        plan: SegmentPlan,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        group_of: Callable[[BlockRows], Group],
        num_rows: int,
    ) -> torch.Tensor:
        """[num_rows, H]: input embeddings of a forward; behind its own rows, anything.

        Args:
            input_ids, positions: [M] of its rows.
            group_of: the group that decides some blocks.
            num_rows: rows with padding, at least M.
        """
        self._rows[: len(input_ids)] = self._embed(input_ids)
        for blocks in plan.groups:
            group, rows = group_of(blocks), blocks.canvas_rows
            assert rows is not None
            if len(rows) and (self._condition is not None or WHERE in group.memory):
                self._soften(group, rows, plan.row_slots, positions, blocks.width)
        return self._rows[:num_rows]

    def _soften(
        self,
        group: Group,
        rows: torch.Tensor,
        row_slots: torch.Tensor,
        positions: torch.Tensor,
        width: int,
    ) -> None:
        """Write the inputs of a group's active blocks.

        Args:
            rows: [n]: of the forward.
            row_slots, positions: [M]: of all its rows.
            width: B.
        """
        table, memory = self._slots, group.memory
        slots = row_slots[rows]
        offsets = positions[rows] - table.block_start[slots]
        # Requests that run ahead name all of their rows.
        is_canvas = (offsets >= 0) & (offsets < width)
        own = self._rows[rows]
        mixed, is_soft = torch.zeros_like(own), is_canvas
        inputs = group.strategy.soft(group.strategy.params)
        if inputs is not None:
            at = table.seat[slots], offsets.clamp(0, width - 1)
            is_soft = is_canvas & memory[WHERE][at] & (table.step[slots] > 0)
            mixed = self._mixture(memory, inputs, at)
            # Logits that are broken leave their row hard.
            is_soft = is_soft & mixed.isfinite().all(dim=1)
            mixed = torch.where(is_soft[:, None], mixed, 0).to(own.dtype)
        if self._condition is not None:
            made, changes = self._condition(own, mixed), is_canvas
        elif inputs is not None and inputs.law == "add":
            made, changes = own + mixed, is_soft
        else:
            made, changes = mixed, is_soft
        self._rows[rows] = torch.where(changes[:, None], made, own)

    def _mixture(
        self,
        memory: dict[str, torch.Tensor],
        inputs: SoftInputs,
        at: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """[n, H] float32: the mixtures that decisions have named.

        Args:
            at: [n] seats and [n] offsets in their blocks.
        """
        weights = memory[WEIGHTS][at]
        if inputs.source == "full":
            return memory[MIXTURES][at].float() * weights
        ids = memory[IDS][at]
        parts = self._embed(ids.flatten()).view(*ids.shape, -1).float()
        weights = weights[..., None]
        mixed = (weights * parts).sum(dim=1)
        if inputs.keeps_norm:
            wanted = (weights * parts.norm(dim=2, keepdim=True)).sum(dim=1)
            mixed = mixed / (mixed.norm(dim=1, keepdim=True) + _TINY) * wanted
        return mixed
