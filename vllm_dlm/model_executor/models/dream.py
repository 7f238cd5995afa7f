# SPDX-License-Identifier: Apache-2.0
"""Dream, Dream-Coder and DiffuCoder: the network and weight names are Qwen2's.

Their attention biases are those vLLM's Qwen2 always has: on q, k and v, none on o.
"""

from __future__ import annotations

from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

from vllm_dlm.model_executor.models.diffusion import DiffusionModelMixin


class DreamModel(DiffusionModelMixin, Qwen2ForCausalLM):
    """Dream (architecture `DreamModel`)."""
