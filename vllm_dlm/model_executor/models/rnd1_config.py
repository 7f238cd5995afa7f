# SPDX-License-Identifier: Apache-2.0
"""HF config of RND1-Base-0910: Qwen3-MoE with full attention and shifted logits.

It was made from Qwen3-30B-A3B, an autoregressive model, and still predicts a token from
the row to its left. Fields that config.json leaves out are those of the released class.
Source: radicalnumerics/RND1-Base-0910 and its code, `configuration_rnd.py`.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen3MoeConfig

from vllm_dlm.config.model import declare
from vllm_dlm.model_executor.models.declarations import fill, stop_ids
from vllm_dlm.model_executor.models.reading import Family, FamilyConfig, read

RND1_MASK_ID = 151669
RND1_STOP_IDS = (151645, 151643)
"""`<|im_end|>`, which the released loop ends with, and `<|endoftext|>`, its padding."""


class RND1Config(FamilyConfig, Qwen3MoeConfig):
    """RND1's configuration: every layer has experts, none is shared."""

    model_type = "rnd1"
    family = Family(
        "RND1",
        ("RND1LM",),
        computes={
            "use_qk_norm": (True,),
            "num_experts": None,
            "decoder_sparse_step": (1,),
        },
        rope_theta=1e6,
    )

    def __init__(self, **kwargs: Any) -> None:
        read(self.family, kwargs)
        fill(
            kwargs,
            vocab_size=151936,
            hidden_size=2048,
            head_dim=128,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            max_position_embeddings=40960,
            rms_norm_eps=1e-6,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            tie_word_embeddings=False,
            eos_token_id=151645,
            pad_token_id=151643,
        )
        declare(
            self,
            kwargs,
            dlm_class="full",
            mask_token_id=RND1_MASK_ID,
            dlm_reference_confidence="drawn",
            dlm_shift=1,
            dlm_stop_ids=stop_ids(kwargs, RND1_MASK_ID, RND1_STOP_IDS),
        )
        super().__init__(**kwargs)
