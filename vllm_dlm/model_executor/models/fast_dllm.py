# SPDX-License-Identifier: Apache-2.0
"""Fast-dLLM v2: the network and weight names are Qwen2's."""

from __future__ import annotations

from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

from vllm_dlm.model_executor.models.diffusion import DiffusionModelMixin


class FastDLLMQwenForCausalLM(DiffusionModelMixin, Qwen2ForCausalLM):
    """Fast-dLLM v2 (architecture `Fast_dLLM_QwenForCausalLM`)."""
