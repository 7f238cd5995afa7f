# SPDX-License-Identifier: Apache-2.0
"""RND1: the network and weight names are Qwen3-MoE's."""

from __future__ import annotations

from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from vllm_dlm.model_executor.models.diffusion import DiffusionModelMixin


class RND1LM(DiffusionModelMixin, Qwen3MoeForCausalLM):
    """RND1 (architecture `RND1LM`)."""
