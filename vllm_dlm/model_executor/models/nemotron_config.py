# SPDX-License-Identifier: Apache-2.0
"""HF config of Nemotron-Labs-Diffusion: Ministral-3 that decodes blocks of 32.

A block sees what is left of it, read causally, and itself whole. The causal forward
over the prompt or a finished block also writes the next block's first token, as an
autoregressive model would: so it is in copies of the released `generate`, our only
source for it (vLLM's pull request #48279 has no such token; `"dlm_seeds": false` in
config.json decodes that way). Nothing here was compared with the released weights.
Source: nvidia/Nemotron-Labs-Diffusion, vLLM pull request #48279.
"""

from __future__ import annotations

from typing import Any

from transformers import Ministral3Config

from vllm_dlm.config.model import declare
from vllm_dlm.model_executor.models.declarations import fill
from vllm_dlm.model_executor.models.names import NEMOTRON_NAMES
from vllm_dlm.model_executor.models.reading import Family, FamilyConfig, read

NEMOTRON_MASK_ID = 100


class NemotronLabsDiffusionConfig(FamilyConfig, Ministral3Config):
    """Nemotron-Labs-Diffusion's configuration; `block_size` is its block length."""

    model_type = "nemotron_labs_diffusion"
    family = Family(
        "Nemotron-Labs-Diffusion",
        ("NemotronLabsDiffusionModel",),
        # Ministral-3's, where the config says nothing.
        rope_theta=None,
        module_names=NEMOTRON_NAMES,
        rope_extra=("llama_4_scaling_beta",),
        windows_are_off=False,
    )

    def __init__(self, **kwargs: Any) -> None:
        read(self.family, kwargs)
        fill(kwargs, block_size=32)
        declare(
            self,
            kwargs,
            dlm_class="causal",
            dlm_seeds=True,
            mask_token_id=NEMOTRON_MASK_ID,
            dlm_block_length=kwargs["block_size"],
            dlm_strategy_config={"threshold": 0.9},
        )
        super().__init__(**kwargs)
        # vLLM's Mistral looks for it outside of the RoPE parameters.
        rope = self.rope_parameters
        if rope.get("llama_4_scaling_beta"):
            self.llama_4_scaling = {
                "beta": rope["llama_4_scaling_beta"],
                "original_max_position_embeddings": rope[
                    "original_max_position_embeddings"
                ],
            }
