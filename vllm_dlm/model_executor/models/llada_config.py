# SPDX-License-Identifier: Apache-2.0
"""HF config of LLaDA-8B and LLaDA-1.5 in the standard names vLLM's Llama reads.

The released `config.json` uses OLMo-like names (`d_model`, `n_layers`, ...), omits
ids that only the tokenizer knows, and is served without `trust_remote_code`.
Source: ML-GSAI/LLaDA, `configuration_llada.py` fields as released.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from vllm_dlm.model_defaults import declare
from vllm_dlm.model_executor.models.declarations import refuse, stop_ids
from vllm_dlm.model_executor.models.llada_moe_config import (
    LLADA_MOE_ARCHITECTURES,
    LLaDAMoEConfig,
)

LLADA_MASK_ID = 126336
LLADA_EOT_ID = 126348
"""`<|eot_id|>`, known to LLaDA's tokenizer only, not to its config."""
LLADA_VOCAB_SIZE = 126464


class LLaDAConfig(PretrainedConfig):
    """LLaDA's configuration, OLMo names mapped to Llama's.

    LLaDA-MoE checkpoints have the same model type: `from_dict`, which every loader
    goes through, hands them over to `LLaDAMoEConfig`.
    """

    model_type = "llada"
    attribute_map = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "mlp_hidden_size": "intermediate_size",
        "max_sequence_length": "max_position_embeddings",
    }

    def __init__(
        self,
        d_model: int = 4096,
        n_layers: int = 32,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        mlp_hidden_size: int | None = None,
        mlp_ratio: int = 4,
        max_sequence_length: int = 4096,
        vocab_size: int = LLADA_VOCAB_SIZE,
        embedding_size: int | None = None,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 500000.0,
        weight_tying: bool = False,
        **kwargs: Any,
    ) -> None:
        refuse(
            "LLaDA",
            kwargs,
            "attention_layer_norm",
            "alibi",
            "scale_logits",
            "input_emb_norm",
            "include_qkv_bias",
            "include_bias",
        )
        self.hidden_size = d_model
        self.num_hidden_layers = n_layers
        self.num_attention_heads = n_heads
        self.num_key_value_heads = n_kv_heads or n_heads
        self.intermediate_size = mlp_hidden_size or mlp_ratio * d_model
        self.head_dim = d_model // n_heads
        self.hidden_act = "silu"
        self.max_position_embeddings = max_sequence_length
        # The embedding may be padded beyond the tokenizer's vocabulary.
        self.vocab_size = embedding_size or vocab_size
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta}
        self.attention_bias = False
        self.mlp_bias = False
        declare(
            self,
            kwargs,
            dlm_class="A",
            mask_token_id=LLADA_MASK_ID,
            dlm_stop_ids=stop_ids(kwargs, LLADA_MASK_ID, (LLADA_EOT_ID,)),
        )
        kwargs.setdefault("tie_word_embeddings", weight_tying)
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of a dense LLaDA or a LLaDA-MoE, by `architectures`."""
        if LLADA_MOE_ARCHITECTURES & set(config_dict.get("architectures") or ()):
            return LLaDAMoEConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)
