# SPDX-License-Identifier: Apache-2.0
"""Every family's config.json, tiny: the released keys, and none that are not released.

LLaDA-MoE's, Tiny-A2D's and Nemotron's keys are inferred from other projects' copies.
One deviation: `mask_token_id` and `eos_token_id` are always there, because the ids that
a family takes for granted lie outside a tiny vocabulary. LLaDA's own config is in
`reference.llada`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """What a family's config.json holds besides `COMMON`."""

    architecture: str
    model_type: str
    auto_map: dict[str, str]
    config: dict[str, Any]
    per_layer: dict[str, Any] = field(default_factory=dict)
    """Keys that hold a list with this value for each layer."""
    names_head_dim: bool = True
    """Whether there is a `head_dim`; if not, heads divide the hidden size."""
    lacks: tuple[str, ...] = ()
    """Keys of `COMMON` that it does not have."""


COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "eos_token_id": 121,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "mask_token_id": 120,
    "max_position_embeddings": 1024,
    "num_hidden_layers": 2,
    "pad_token_id": 121,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.52.3",
    "use_cache": True,
    "vocab_size": 128,
}
_QWEN = {
    "bos_token_id": 121,
    "intermediate_size": 128,
    "max_window_layers": 2,
    "sliding_window": None,
    "use_sliding_window": False,
}
# Without a head_dim in config.json, hidden_size is heads * head_dim.
_QWEN2 = _QWEN | {"num_attention_heads": 3, "num_key_value_heads": 1}
_QWEN3 = _QWEN | {
    "attention_bias": False,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Left over from training; nothing here concerns inference.
_SDAR = _QWEN3 | {
    "attn_implementation": "flex_attention",
    "debug": False,
    "fuse_cross_entropy": True,
    "micro_forward": False,
    "use_deepep": False,
}

_LLADA2_NAMES = (
    "LLaDA2MoeModelLM",
    "llada2_moe",
    {
        "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    },
)
_LLADA2 = {
    "embedding_dropout": 0.0,
    "first_k_dense_replace": 1,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "n_group": 4,
    "norm_head": False,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "partial_rotary_factor": 0.5,
    "rope_theta": 600000,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "topk_group": 2,
    "use_sliding_window": False,
}

FAMILIES = {
    "llada_moe": Family(
        "LLaDAMoEModelLM",
        # The same as dense LLaDA's.
        "llada",
        {
            "AutoConfig": "configuration_lladamoe.LLaDAConfig",
            "AutoModel": "modeling_lladamoe.LLaDAMoEModelLM",
            "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
        },
        {
            "attention_bias": False,
            "dense_intermediate_size": 128,
            "expert_intermediate_size": 64,
            "moe_router_enable_expert_bias": False,
            "moe_router_score_function": "softmax",
            # The released code never reads it: a loader must not either.
            "norm_topk_prob": True,
            "num_attention_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "num_key_value_heads": 2,
            "output_router_logits": False,
            "partial_rotary_factor": 1.0,
            "qk_layernorm": True,
            "rms_norm_eps": 1e-5,
            "rope_theta": 50000.0,
            "router_aux_loss_coef": 0.01,
            "shared_expert_intermediate_size": None,
        },
        per_layer={"moe_layer_freq": 1},
        names_head_dim=False,
    ),
    # Some released configs lack moe_router_enable_expert_bias, rotary_dim,
    # router_dtype, use_qk_norm, use_qkv_bias and use_bias, as this one does.
    "llada2": Family(*_LLADA2_NAMES, _LLADA2 | {"sliding_window": 4096}),
    # Other than 2.0: experts are admitted by block, and two tokens edit.
    "llada2_2": Family(
        *_LLADA2_NAMES,
        _LLADA2
        | {
            "block_size": 8,
            "delete_token_id": 90,
            "expert_capacity": 6,
            "rope_theta": 3000000,
            "split_token_id": 91,
            "use_qk_norm": True,
        },
    ),
    # No block_size: it is in the repository's name, if anywhere.
    "sdar": Family(
        "SDARForCausalLM",
        "sdar",
        {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        _SDAR,
    ),
    "sdar_moe": Family(
        "SDARMoeForCausalLM",
        "sdar_moe",
        {
            "AutoConfig": "configuration_sdar_moe.SDARMoeConfig",
            "AutoModel": "modeling_sdar_moe.SDARMoeModel",
            "AutoModelForCausalLM": "modeling_sdar_moe.SDARMoeForCausalLM",
        },
        _SDAR
        | {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        },
    ),
    "dream": Family(
        "DreamModel",
        "Dream",
        {
            "AutoConfig": "configuration_dream.DreamConfig",
            "AutoModel": "modeling_dream.DreamModel",
        },
        _QWEN2,
        names_head_dim=False,
    ),
    "fast_dllm_v2": Family(
        "Fast_dLLM_QwenForCausalLM",
        "Fast_dLLM_Qwen",
        {
            "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
            "AutoModel": "modeling.Fast_dLLM_QwenModel",
            "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
        },
        _QWEN2 | {"bd_size": 32},
        per_layer={"layer_types": "full_attention"},
        names_head_dim=False,
    ),
    # Its repository's name says which attention it has: -mdlm- full, -bd3lm- block.
    "a2d_qwen3": Family(
        "A2DQwen3LMHeadModel",
        "a2d-qwen3",
        {
            "AutoConfig": "modeling_qwen3.A2DQwen3Config",
            "AutoModel": "modeling_qwen3.A2DQwen3Model",
            "AutoModelForMaskedLM": "modeling_qwen3.A2DQwen3LMHeadModel",
        },
        _QWEN3 | {"tie_word_embeddings": True},
        per_layer={"layer_types": "full_attention"},
    ),
    "a2d_qwen2": Family(
        "A2DQwen2LMHeadModel",
        "a2d-qwen2",
        {
            "AutoConfig": "modeling_qwen2.A2DQwen2Config",
            "AutoModel": "modeling_qwen2.A2DQwen2Model",
            "AutoModelForMaskedLM": "modeling_qwen2.A2DQwen2LMHeadModel",
        },
        _QWEN2 | {"tie_word_embeddings": True},
        per_layer={"layer_types": "full_attention"},
        names_head_dim=False,
    ),
    "a2d_llama": Family(
        "A2DLlamaLMHeadModel",
        "a2d-llama",
        {
            "AutoConfig": "modeling_llama.A2DLlamaConfig",
            "AutoModel": "modeling_llama.A2DLlamaModel",
            "AutoModelForMaskedLM": "modeling_llama.A2DLlamaLMHeadModel",
        },
        {
            "attention_bias": False,
            "bos_token_id": 121,
            "intermediate_size": 128,
            "mlp_bias": False,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
        },
    ),
    "nemotron": Family(
        "NemotronLabsDiffusionModel",
        "nemotron_labs_diffusion",
        {
            "AutoConfig": (
                "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig"
            ),
            "AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel",
        },
        {
            "ar_loss_weight": 1.0,
            "attention_bias": False,
            "attn_implementation": "sdpa",
            "block_size": 32,
            "bos_token_id": 1,
            "dlm_loss_weight": None,
            "dlm_paradigm": "bidirectional",
            "dp_varying_mask_ratio": False,
            "intermediate_size": 128,
            # Released: 262144, 16 times the original 16384. Here short texts reach
            # beyond what a position meant before it was scaled.
            "max_position_embeddings": 256,
            "mlp_bias": False,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 8.0,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 1000000.0,
                "rope_type": "yarn",
            },
            "sliding_window": None,
            "use_cache": False,
        },
        lacks=("pad_token_id", "rope_scaling", "rope_theta"),
    ),
    # False where others have null, as the released class writes it.
    "rnd1": Family(
        "RND1LM",
        "rnd1",
        {
            "AutoConfig": "configuration_rnd.RND1Config",
            "AutoModel": "modeling_rnd.RND1Model",
            "AutoModelForMaskedLM": "modeling_rnd.RND1LM",
        },
        _QWEN3
        | {
            "decoder_sparse_step": 1,
            "is_causal": False,
            "mlp_only_layers": [],
            "moe_backend": "hf",
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            "num_diffusion_steps": 256,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "output_router_logits": False,
            "rope_scaling": False,
            "router_aux_loss_coef": 0.001,
            "sliding_window": False,
        },
    ),
    # The model type is Dream's.
    "dream_reasoner": Family(
        "DreamForCausalLM",
        "Dream",
        {
            "AutoConfig": "configuration_dream.DreamConfig",
            "AutoModel": "modeling_dream.DreamForCausalLM",
            "AutoModelForCausalLM": "modeling_dream.DreamForCausalLM",
        },
        _QWEN3 | {"block_size": 32},
    ),
    # The model type is every Llama's.
    "stable_diffcoder": Family(
        "StableDiffcoderForCausalLM",
        "llama",
        {
            "AutoModelForCausalLM": (
                "modeling_stable_diffcoder.StableDiffcoderForCausalLM"
            ),
        },
        {
            "attention_bias": False,
            "bos_token_id": 0,
            "intermediate_size": 128,
            "mlp_bias": False,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_theta": 500000.0,
        },
    ),
}
