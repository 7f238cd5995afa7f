# SPDX-License-Identifier: Apache-2.0
"""What decisions feed the next forward beside tokens, by seat of a group (`groups.py`).

A decision says where (`Decision.soft`), and the step function keeps that. Mixtures of
all tokens are kept too, where a strategy asks for them, by the tile of logits that they
are made of (`rows.py`): logits do not outlast their tile. Mixtures of a few tokens are
made of their ids when the next forward is fed (`model_executor/soft_inputs.py`).

Nothing needs to be forgotten. What lies here is of the step before, in the same block:
step 0 of a block finds nothing, and so does a request that comes back after a
preemption, or that has another's seat.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_dlm.strategies.base import Soft, SoftInputs, StateField

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_dlm.model_executor.planning.block_rows import BlockRows, Blocks

# No name of a strategy's state has a space.
WHERE, WEIGHTS, IDS = "soft where", "soft weights", "soft ids"
"""Fields of a group's memory, as of `Soft`: [B], [B, K] and, of "top", [B, K]."""
MIXTURES = "soft mixtures"
"""Of "full": [B, H], in the model's type."""


def soft_fields(
    inputs: SoftInputs, block_length: int, size: int, dtype: torch.dtype
) -> dict[str, StateField]:
    """What a group keeps for each request, by field.

    Args:
        inputs: what its strategy declares.
        block_length: B, of its requests.
        size: H, of an embedding.
        dtype: of embeddings.
    """
    each = block_length, inputs.num_ids
    fields = {WHERE: StateField(each[:1], torch.bool), WEIGHTS: StateField(each)}
    if inputs.source == "top":
        return {**fields, IDS: StateField(each, torch.int64)}
    return {**fields, MIXTURES: StateField((block_length, size), dtype)}


def keep_mixtures(
    memory: torch.Tensor,
    blocks: BlockRows,
    own: slice | torch.Tensor,
    mixed: torch.Tensor,
) -> None:
    """Keep mixtures of all tokens.

    Args:
        memory: [seats + 1, B, H]: of the group.
        blocks: R blocks of it.
        own: which n of their rows the mixtures are of.
        mixed: [n, H].
    """
    seats = blocks.blocks.requests.seat[blocks.row_request[own]]
    memory[seats, blocks.row_places[own] % blocks.width] = mixed


def keep_soft(
    memory: Mapping[str, torch.Tensor], soft: Soft | None, blocks: Blocks
) -> None:
    """Keep what a step's decision feeds the next forward.

    Args:
        memory: of the group.
        soft: of the decision, held to the rules of decoding.
        blocks: what was decided.
    """
    if WHERE not in memory:
        return
    seats = blocks.requests.seat
    if soft is None:
        memory[WHERE][seats] = torch.zeros_like(blocks.valid)
        return
    # A block's lead is decided by itself: it is no step of the strategy.
    memory[WHERE][seats] = soft.where & ~blocks.leads[:, None]
    memory[WEIGHTS][seats] = soft.weights
    if soft.ids is not None:
        memory[IDS][seats] = soft.ids
