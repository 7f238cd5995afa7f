# SPDX-License-Identifier: Apache-2.0
"""LLaDA2.0 and LLaDA2.1 as their difference from vLLM's Bailing-MoE-V2.

Network and weight names are the same. The reference chooses experts by float32
scores; vLLM computes them in float32 and then rounds them to the model's dtype, which
in bfloat16 picks other experts where scores nearly tie.
"""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.bailing_moe import (
    BailingMoE,
    BailingMoeV2ForCausalLM,
)

from vllm_dlm.model_executor.models.diffusion import DiffusionModelMixin


class LLaDA2SparseMoE(BailingMoE):
    """vLLM's expert layer, its router's scores left in float32."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states in and out, [rows, hidden]."""
        scores, _ = self.gate(hidden_states)
        output: torch.Tensor = self.experts(
            hidden_states=hidden_states, router_logits=scores
        )
        return output


class LLaDA2MoeModelLM(DiffusionModelMixin, BailingMoeV2ForCausalLM):
    """LLaDA2.0 and LLaDA2.1 (architecture `LLaDA2MoeModelLM`)."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for layer in self.model.layers:
            if isinstance(getattr(layer, "mlp", None), BailingMoE):
                # vLLM's layer names its expert class itself. A second instance would
                # register its experts twice, so this one changes its class.
                layer.mlp.__class__ = LLaDA2SparseMoE
