# SPDX-License-Identifier: Apache-2.0
"""DreamReasoner: the network and weight names are Qwen3's."""

from __future__ import annotations

from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from vllm_dlm.model_executor.models.diffusion import DiffusionModelMixin


class DreamForCausalLM(DiffusionModelMixin, Qwen3ForCausalLM):
    """DreamReasoner (architecture `DreamForCausalLM`)."""
