# SPDX-License-Identifier: Apache-2.0
"""Which class serves which checkpoint: models, configurations, tokenizers, by name.

Names only: reading a table imports none of the classes, and nothing of vLLM.
"""

from __future__ import annotations

_MODELS = "vllm_dlm.model_executor.models"

ARCHITECTURES = {
    "LLaDAModelLM": f"{_MODELS}.llada:LLaDAModelLM",
    "LLaDAMoEModelLM": f"{_MODELS}.llada_moe:LLaDAMoEModelLM",
    "LLaDAMoEModel": f"{_MODELS}.llada_moe:LLaDAMoEModelLM",
    "LLaDA2MoeModelLM": f"{_MODELS}.llada2:LLaDA2MoeModelLM",
    "DreamModel": f"{_MODELS}.dream:DreamModel",
    "DreamForCausalLM": f"{_MODELS}.dream_reasoner:DreamForCausalLM",
    "SDARForCausalLM": f"{_MODELS}.sdar:SDARForCausalLM",
    "SDARMoeForCausalLM": f"{_MODELS}.sdar:SDARMoeForCausalLM",
    "Fast_dLLM_QwenForCausalLM": f"{_MODELS}.fast_dllm:FastDLLMQwenForCausalLM",
    "A2DQwen3LMHeadModel": f"{_MODELS}.a2d:A2DQwen3LMHeadModel",
    "A2DQwen2LMHeadModel": f"{_MODELS}.a2d:A2DQwen2LMHeadModel",
    "A2DLlamaLMHeadModel": f"{_MODELS}.a2d:A2DLlamaLMHeadModel",
    "NemotronLabsDiffusionModel": f"{_MODELS}.nemotron:NemotronLabsDiffusionModel",
    "RND1LM": f"{_MODELS}.rnd1:RND1LM",
    # Released as DiffusionGemmaForBlockDiffusion, which is vLLM's own.
    "DlmDiffusionGemma": f"{_MODELS}.diffusion_gemma:DlmDiffusionGemma",
    "StableDiffcoderForCausalLM": (
        f"{_MODELS}.stable_diffcoder:StableDiffcoderForCausalLM"
    ),
}
"""HF architecture -> model class."""

_LAYER_SKIP = "vllm_dlm.layer_skip.models"

AUTOREGRESSIVE = {
    "DlmSteeredForCausalLM": "vllm_dlm.steering.model:DlmSteeredForCausalLM",
    "LayerSkipLlamaForCausalLM": f"{_LAYER_SKIP}:LayerSkipLlamaForCausalLM",
    "LayerSkipQwen2ForCausalLM": f"{_LAYER_SKIP}:LayerSkipQwen2ForCausalLM",
    "LayerSkipQwen3ForCausalLM": f"{_LAYER_SKIP}:LayerSkipQwen3ForCausalLM",
}
"""The same of models of the wings, which are no diffusion models: no hook of ours."""

HF_CONFIGS = {
    "llada": f"{_MODELS}.llada_config:LLaDAConfig",
    # As dllm's trainer calls LLaDA-MoE, and dFactory's LLaDA2 with stacked experts.
    "lladamoe": f"{_MODELS}.llada_moe_config:LLaDAMoEConfig",
    "llada2_moe": f"{_MODELS}.llada2_config:LLaDA2MoeConfig",
    "llada2_moe_veomni": f"{_MODELS}.llada2_config:LLaDA2MoeConfig",
    "Dream": f"{_MODELS}.dream_config:DreamConfig",
    "sdar": f"{_MODELS}.sdar_config:SDARConfig",
    "sdar_moe": f"{_MODELS}.sdar_config:SDARMoeConfig",
    "Fast_dLLM_Qwen": f"{_MODELS}.fast_dllm_config:FastDLLMQwenConfig",
    "a2d-qwen3": f"{_MODELS}.a2d_config:A2DQwen3Config",
    "a2d-qwen2": f"{_MODELS}.a2d_config:A2DQwen2Config",
    "a2d-llama": f"{_MODELS}.a2d_config:A2DLlamaConfig",
    "nemotron_labs_diffusion": f"{_MODELS}.nemotron_config:NemotronLabsDiffusionConfig",
    "rnd1": f"{_MODELS}.rnd1_config:RND1Config",
    # Stable-DiffCoder's; every other Llama becomes what it is without us.
    "llama": f"{_MODELS}.stable_diffcoder_config:StableDiffCoderConfig",
}
"""HF `model_type` -> config class, so that no checkpoint needs trust_remote_code."""

TOKENIZERS = {"Dream": f"{_MODELS}.dream_tokenizer:DreamTokenizer"}
"""HF `model_type` -> tokenizer class, where the checkpoint would bring its own code."""

CONFIG_HOOK = "vllm_dlm.model_executor.config_hook:DlmModelConfig"
"""The vLLM configuration hook of all these architectures."""
