# SPDX-License-Identifier: Apache-2.0
"""Sizes of the released models with a short name, for those not on this machine.

Fields of a config.json that say how many weights and keys a model has, and no others.
Where no published config was at hand, the base model's sizes stand in; `source` says
which. `tests/cli/test_memory.py` compares them with the released configs
that the tests know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_dlm.config import aliases

RELEASED = "the released config.json"


@dataclass(frozen=True)
class Shape:
    """How large a model is."""

    fields: Mapping[str, Any]
    """Of config.json."""
    source: str = RELEASED
    """Where the fields stem from."""


def _sizes(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    **further: Any,
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        **further,
    }


_HEAD = {"head_dim": 128}
_QWEN = 151936
_TIED = {"tie_word_embeddings": True}

LLADA = Shape(_sizes(4096, 12288, 32, 32, 32, 126464))
LLADA_MOE = Shape(
    {
        name: value
        for name, value in _sizes(2048, 0, 16, 16, 16, 157184).items()
        if name != "intermediate_size"
    }
    | {
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "expert_intermediate_size": 1024,
        "dense_intermediate_size": 8192,
        "moe_layer_freq": [1] * 16,
        "qk_layernorm": True,
    }
)
_EXPERTS = {
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
}
LLADA2_MINI = Shape(
    _sizes(2048, 5120, 20, 16, 4, 157184, moe_intermediate_size=512, **_HEAD) | _EXPERTS
)
LLADA2_FLASH = Shape(
    _sizes(4096, 9216, 32, 32, 4, 157184, moe_intermediate_size=1024, **_HEAD)
    | _EXPERTS
)
_LLADA2_2 = {"delete_token_id": 156930, "split_token_id": 156931, "block_size": 32}
_CAPACITY = {"expert_capacity": 48}
DREAM = Shape(_sizes(3584, 18944, 28, 28, 4, 152064))
QWEN3_1_7B = _sizes(2048, 6144, 28, 16, 8, _QWEN, **_HEAD)
QWEN3_4B = _sizes(2560, 9728, 36, 32, 8, _QWEN, **_HEAD)
QWEN3_8B = _sizes(4096, 12288, 36, 32, 8, _QWEN, **_HEAD)
QWEN3_30B = _sizes(2048, 6144, 48, 32, 4, _QWEN, **_HEAD) | {
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
MINISTRAL_14B = _sizes(5120, 16384, 40, 32, 8, 131072, **_HEAD)

_BY_TARGET: dict[str, Shape] = {
    "GSAI-ML/LLaDA": LLADA,
    "inclusionAI/LLaDA-MoE": LLADA_MOE,
    "inclusionAI/LLaDA2.0-mini": LLADA2_MINI,
    "inclusionAI/LLaDA2.0-flash": LLADA2_FLASH,
    "inclusionAI/LLaDA2.1-mini": LLADA2_MINI,
    "inclusionAI/LLaDA2.1-flash": LLADA2_FLASH,
    "inclusionAI/LLaDA2.2-mini": Shape(
        {**LLADA2_MINI.fields, **_LLADA2_2, **_CAPACITY}, "LLaDA2.0-mini's"
    ),
    "inclusionAI/LLaDA2.2-flash": Shape(
        {**LLADA2_FLASH.fields, **_LLADA2_2, **_CAPACITY}, "LLaDA2.0-flash's"
    ),
    "Dream-org/DreamReasoner": Shape(QWEN3_8B, "Qwen3-8B's, its base"),
    "Dream-org/Dream": DREAM,
    "apple/DiffuCoder": DREAM,
    "JetLM/SDAR-1.7B": Shape(QWEN3_1_7B, "Qwen3-1.7B's, its base; head not shared"),
    "JetLM/SDAR-4B": Shape(QWEN3_4B),
    "JetLM/SDAR-8B": Shape(QWEN3_8B),
    "JetLM/SDAR-30B": Shape(QWEN3_30B, "Qwen3-30B-A3B's, its base"),
    "Gen-Verse/TraDo-4B": Shape(QWEN3_4B, "SDAR-4B's, its base"),
    "Gen-Verse/TraDo-8B": Shape(QWEN3_8B, "SDAR-8B's, its base"),
    "lulululuyi/TDAR-8B": Shape(QWEN3_8B, "SDAR-8B's, its base"),
    "Efficient-Large-Model/Fast_dLLM_v2_1.5B": Shape(
        _sizes(1536, 8960, 28, 12, 2, _QWEN) | _TIED, "Qwen2.5-1.5B's, its base"
    ),
    "Efficient-Large-Model/Fast_dLLM_v2_7B": Shape(
        _sizes(3584, 18944, 28, 28, 4, 152064), "Qwen2.5-7B's, its base"
    ),
    "dllm-hub/Qwen3-0.6B": Shape(
        _sizes(1024, 3072, 28, 16, 8, _QWEN, **_HEAD) | _TIED, "Qwen3-0.6B's, its base"
    ),
    "dllm-hub/Qwen2.5-Coder-0.5B": Shape(
        _sizes(896, 4864, 24, 14, 2, _QWEN) | _TIED, "Qwen2.5-Coder-0.5B's, its base"
    ),
    "nvidia/Nemotron-Labs-Diffusion-3B": Shape(
        _sizes(3072, 9216, 26, 32, 8, 131072, **_HEAD)
    ),
    "nvidia/Nemotron-Labs-Diffusion-8B": Shape(
        _sizes(4096, 14336, 34, 32, 8, 131072, **_HEAD)
    ),
    "nvidia/Nemotron-Labs-Diffusion-14B": Shape(
        MINISTRAL_14B, "Ministral-3-14B's, its base"
    ),
    "radicalnumerics/RND1": Shape(QWEN3_30B, "its published configuration class"),
    "ByteDance-Seed/Stable-DiffCoder": Shape(
        _sizes(4096, 14336, 32, 32, 8, 155136, **_HEAD),
        "another engine's defaults for it",
    ),
}
"""By the beginning of a hub id."""


def released_config(name: str) -> tuple[dict[str, Any], str]:
    """A config.json with the sizes of a released model.

    Args:
        name: a short name that stands for a hub checkpoint.

    Returns:
        Its fields, and where its sizes stem from.

    Raises:
        ValueError: the short name is of no such model.
    """
    alias = aliases.ALIASES[name]
    if alias.built_in:
        raise ValueError(f"{name} is built in: its folder has its config.json")
    found = [start for start in _BY_TARGET if alias.target.startswith(start)]
    shape = _BY_TARGET[max(found, key=len)]
    named = {
        "architectures": [alias.family.architecture],
        "model_type": alias.family.model_type,
    }
    return {**named, **shape.fields}, shape.source
