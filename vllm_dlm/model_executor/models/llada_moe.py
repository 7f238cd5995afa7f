# SPDX-License-Identifier: Apache-2.0
"""LLaDA-MoE: the network and weight names are Qwen3-MoE's.

Its router takes a float32 softmax over all experts and keeps the chosen weights as
they are: vLLM's router with `norm_topk_prob` off, which the config sees to. The
reference rounds these weights to the model's dtype, vLLM does not.
"""

from __future__ import annotations

from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from vllm_dlm.model_executor.models.diffusion import DiffusionModelMixin


class LLaDAMoEModelLM(DiffusionModelMixin, Qwen3MoeForCausalLM):
    """LLaDA-MoE (architectures `LLaDAMoEModelLM` and `LLaDAMoEModel`)."""
