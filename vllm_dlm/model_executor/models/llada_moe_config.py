# SPDX-License-Identifier: Apache-2.0
"""HF config of LLaDA-MoE-7B-A1B in the names vLLM's Qwen3-MoE reads.

The released checkpoint's model type is that of dense LLaDA; `LLaDAConfig.from_dict`
tells them apart. Trainers write `lladamoe`. Field values follow third-party copies of
the released config (dllm, dInfer).
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen3MoeConfig

from vllm_dlm.config.model import declare
from vllm_dlm.model_executor.models.declarations import fill
from vllm_dlm.model_executor.models.reading import Family, FamilyConfig, read

LLADA_MOE_ARCHITECTURES = ("LLaDAMoEModelLM", "LLaDAMoEModel")
LLADA_MOE_MASK_ID = 156895
LLADA_MOE_EOS_ID = 156892


class LLaDAMoEConfig(FamilyConfig, Qwen3MoeConfig):
    """LLaDA-MoE's configuration: every layer sparse, no shared expert."""

    model_type = "llada"
    family = Family(
        "LLaDA-MoE",
        LLADA_MOE_ARCHITECTURES,
        computes={
            "use_qk_norm": (True,),
            "num_experts": None,
            "decoder_sparse_step": (1,),
        },
        rope_theta=50000.0,
        windows_are_off=False,
    )

    def __init__(self, **kwargs: Any) -> None:
        read(self.family, kwargs)
        fill(
            kwargs,
            vocab_size=157184,
            hidden_size=2048,
            num_hidden_layers=16,
            num_attention_heads=16,
            num_key_value_heads=kwargs.get("num_attention_heads") or 16,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            num_experts=64,
            num_experts_per_tok=8,
            moe_intermediate_size=1024,
            eos_token_id=LLADA_MOE_EOS_ID,
        )
        kwargs.update(
            # The reference's router never renormalises, whatever the config says.
            norm_topk_prob=False,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            # Null in the released config; vLLM compares it with 0.
            shared_expert_intermediate_size=0,
        )
        declare(self, kwargs, dlm_class="full", mask_token_id=LLADA_MOE_MASK_ID)
        super().__init__(**kwargs)
