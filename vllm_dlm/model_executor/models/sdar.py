# SPDX-License-Identifier: Apache-2.0
"""SDAR, SDAR-MoE, TraDo and TDAR: the networks and weight names are Qwen3's."""

from __future__ import annotations

from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from vllm_dlm.model_executor.models.diffusion import DiffusionModelMixin


class SDARForCausalLM(DiffusionModelMixin, Qwen3ForCausalLM):
    """SDAR, TraDo and TDAR (architecture `SDARForCausalLM`)."""


class SDARMoeForCausalLM(DiffusionModelMixin, Qwen3MoeForCausalLM):
    """SDAR-30B-A3B (architecture `SDARMoeForCausalLM`)."""
