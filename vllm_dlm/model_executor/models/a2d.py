# SPDX-License-Identifier: Apache-2.0
"""A2D: the networks and weight names are those of Qwen3, Qwen2 and Llama."""

from __future__ import annotations

from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from vllm_dlm.model_executor.models.diffusion import DiffusionModelMixin


class A2DQwen3LMHeadModel(DiffusionModelMixin, Qwen3ForCausalLM):
    """A2D from Qwen3 (architecture `A2DQwen3LMHeadModel`)."""


class A2DQwen2LMHeadModel(DiffusionModelMixin, Qwen2ForCausalLM):
    """A2D from Qwen2.5 (architecture `A2DQwen2LMHeadModel`)."""


class A2DLlamaLMHeadModel(DiffusionModelMixin, LlamaForCausalLM):
    """A2D from Llama (architecture `A2DLlamaLMHeadModel`)."""
