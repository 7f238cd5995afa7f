# SPDX-License-Identifier: Apache-2.0
"""LLaDA2.0, LLaDA2.1 and LLaDA2.2 as their difference from vLLM's Bailing-MoE-V2.

Network and weight names are the same. The reference chooses experts by float32
scores; vLLM computes them in float32 and then rounds them to the model's dtype, which
in bfloat16 picks other experts where scores nearly tie. LLaDA2.2 chooses in blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.bailing_moe import (
    BailingMoE,
    BailingMoeV2ForCausalLM,
)

from vllm_dlm.config.request import server_config
from vllm_dlm.model_executor.models.diffusion import DiffusionModelMixin
from vllm_dlm.vllm_objects import replace


class LLaDA2SparseMoE(BailingMoE):
    """vLLM's expert layer, its router's scores left in float32."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states in and out, [rows, hidden]."""
        scores, _ = self.gate(hidden_states)
        output: torch.Tensor = self.experts(
            hidden_states=hidden_states, router_logits=scores
        )
        return output


class BlockRoutedMoE(LLaDA2SparseMoE):
    """An expert layer of LLaDA2.2: a block's experts first, then each row's of these.

    Which experts a row has is decided here. vLLM's router is told by what it is given:
    all others have no score, and no bias is added to any.
    """

    expert_capacity: int
    block_of_row: torch.Tensor
    """[most rows] int64: of the forward; the model writes it."""

    def route_in_blocks(self, expert_capacity: int, block_of_row: torch.Tensor) -> None:
        """Make an expert layer of vLLM's, which has no weights yet, one of these."""
        self.expert_capacity = expert_capacity
        self.register_buffer("block_of_row", block_of_row, persistent=False)
        # vLLM's router and the checkpoint's bias are no longer one tensor.
        no_bias = torch.zeros_like(self.gate.expert_bias.data)
        self.gate.expert_bias = nn.Parameter(torch.empty_like(no_bias))
        replace(self.experts.router, "e_score_correction_bias", no_bias)
        experts = self.experts.routed_experts
        del experts.e_score_correction_bias
        experts.e_score_correction_bias = no_bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states in and out, [rows, hidden]."""
        logits, _ = self.gate(hidden_states)
        chosen = experts_in_blocks(
            logits.sigmoid() + self.gate.expert_bias,
            self.block_of_row[: len(hidden_states)],
            self.expert_capacity,
            self.top_k,
        )
        output: torch.Tensor = self.experts(
            hidden_states=hidden_states,
            router_logits=logits.masked_fill(~chosen, -torch.inf),
        )
        return output


def experts_in_blocks(
    scores: torch.Tensor, block_of_row: torch.Tensor, capacity: int, count: int
) -> torch.Tensor:
    """[n, E] bool: each row's `count` best experts of those that its block admits.

    A block admits the `capacity` experts whose best score of its rows is highest.

    Args:
        scores: [n, E] of n rows and E experts.
        block_of_row: [n] int64, below n.
    """
    nothing = torch.full_like(scores, -torch.inf)
    index = block_of_row[:, None].expand_as(scores)
    of_block = nothing.scatter_reduce(0, index, scores, "amax")
    admitted = _marked(of_block.topk(capacity, dim=1).indices, scores)
    allowed = torch.where(admitted[block_of_row], scores, nothing)
    return _marked(allowed.topk(count, dim=1).indices, scores)


def _marked(indices: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[n, E] bool: True at the indices [n, k]."""
    return torch.zeros_like(like, dtype=torch.bool).scatter_(1, indices, True)


def blocks_of_rows(positions: torch.Tensor, block_length: int) -> torch.Tensor:
    """[n] int64: numbers of the blocks that a forward's rows lie in, from 0.

    A block begins where a multiple of its length is, and where a row does not follow
    the one before it, as in another request.
    """
    follows = positions[1:] == positions[:-1] + 1
    begins = (positions % block_length == 0).long()
    begins[1:] |= (~follows).long()
    return (begins.cumsum(0) - begins[:1]).long()


class LLaDA2MoeModelLM(DiffusionModelMixin, BailingMoeV2ForCausalLM):
    """LLaDA2.0, LLaDA2.1 and LLaDA2.2 (architecture `LLaDA2MoeModelLM`).

    Raises:
        ValueError: experts are chosen in blocks, and blocks of another length served.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        capacity = self.config.expert_capacity
        self._routing_block: int = self.config.block_size
        self._block_of_row: torch.Tensor | None = None
        if capacity:
            self._check_block_length(vllm_config)
            most = vllm_config.scheduler_config.max_num_batched_tokens
            self._block_of_row = torch.zeros(most, dtype=torch.int64)
        for layer in self.model.layers:
            mlp = getattr(layer, "mlp", None)
            if not isinstance(mlp, BailingMoE):
                continue
            # vLLM's layer names its expert class itself. A second instance would
            # register its experts twice, so this one changes its class.
            if self._block_of_row is None:
                mlp.__class__ = LLaDA2SparseMoE
            else:
                mlp.__class__ = BlockRoutedMoE
                mlp.route_in_blocks(capacity, self._block_of_row)

    def _check_block_length(self, vllm_config: VllmConfig) -> None:
        served = server_config(vllm_config).block_length or self.config.dlm_block_length
        if int(served) % self._routing_block:
            raise ValueError(
                f"--dlm-block-length {served} is no multiple of {self._routing_block}: "
                "this LLaDA2 model chooses experts for so many positions at a time "
                "(block_size in config.json)"
            )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Hidden states [n, H] of n rows at `positions` [n]."""
        if self._block_of_row is not None:
            blocks = blocks_of_rows(positions, self._routing_block)
            self._block_of_row[: len(positions)] = blocks
        return super().forward(input_ids, positions, *args, **kwargs)
