# SPDX-License-Identifier: Apache-2.0
"""HF config of LLaDA-8B and LLaDA-1.5 in the standard names vLLM's Llama reads.

The released `config.json` uses OLMo-like names (`d_model`, `n_layers`, ...), omits
ids that only the tokenizer knows, and is served without `trust_remote_code`.
Source: ML-GSAI/LLaDA, `configuration_llada.py` fields as released.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from vllm_dlm.config.model import declare
from vllm_dlm.model_executor.models.config_fields import NAMES, OTHER_NAMES
from vllm_dlm.model_executor.models.declarations import fill, set_fields, stop_ids
from vllm_dlm.model_executor.models.llada_moe_config import (
    LLADA_MOE_ARCHITECTURES,
    LLaDAMoEConfig,
)
from vllm_dlm.model_executor.models.names import LLADA_NAMES
from vllm_dlm.model_executor.models.reading import Family, FamilyConfig, read

LLADA_MASK_ID = 126336
LLADA_EOT_ID = 126348
"""`<|eot_id|>`, known to LLaDA's tokenizer only, not to its config."""
LLADA_VOCAB_SIZE = 126464


class LLaDAConfig(FamilyConfig, PretrainedConfig):
    """LLaDA's configuration, OLMo names mapped to Llama's.

    LLaDA-MoE checkpoints have the same model type: `from_dict`, which every loader
    goes through, hands them over to `LLaDAMoEConfig`.
    """

    model_type = "llada"
    family = Family(
        "LLaDA",
        ("LLaDAModelLM",),
        rope_theta=500000.0,
        module_names=LLADA_NAMES,
        windows_are_off=False,
    )
    attribute_map = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "mlp_hidden_size": "intermediate_size",
        "max_sequence_length": "max_position_embeddings",
    }

    def __init__(self, **kwargs: Any) -> None:
        read(self.family, kwargs)
        fill(
            kwargs,
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            max_position_embeddings=4096,
            vocab_size=LLADA_VOCAB_SIZE,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
        size, heads = kwargs["hidden_size"], kwargs["num_attention_heads"]
        fill(
            kwargs,
            num_key_value_heads=heads,
            intermediate_size=int(kwargs.pop("mlp_ratio", 4) * size),
            head_dim=size // heads,
        )
        # The embedding may be padded beyond the tokenizer's vocabulary.
        kwargs["vocab_size"] = kwargs.pop("embedding_size", kwargs["vocab_size"])
        kwargs.update(hidden_act="silu", attention_bias=False, mlp_bias=False)
        declare(
            self,
            kwargs,
            dlm_class="full",
            mask_token_id=LLADA_MASK_ID,
            dlm_stop_ids=stop_ids(kwargs, LLADA_MASK_ID, (LLADA_EOT_ID,)),
        )
        set_fields(self, kwargs)
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of a dense LLaDA or a LLaDA-MoE.

        `architectures` decides; without it, whether there are experts.
        """
        named = config_dict.get("architectures")
        experts = ("num_experts", *OTHER_NAMES["num_experts"])
        if named is None:
            is_mixture = any(config_dict.get(name) for name in experts)
        else:
            is_mixture = NAMES.accepts(named) and not set(named).isdisjoint(
                LLADA_MOE_ARCHITECTURES
            )
        if is_mixture:
            return LLaDAMoEConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)
