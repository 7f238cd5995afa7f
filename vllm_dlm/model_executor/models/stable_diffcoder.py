# SPDX-License-Identifier: Apache-2.0
"""Stable-DiffCoder: the network and weight names are Llama's."""

from __future__ import annotations

from vllm.model_executor.models.llama import LlamaForCausalLM

from vllm_dlm.model_executor.models.diffusion import DiffusionModelMixin


class StableDiffcoderForCausalLM(DiffusionModelMixin, LlamaForCausalLM):
    """Stable-DiffCoder (architecture `StableDiffcoderForCausalLM`)."""
