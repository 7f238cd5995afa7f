# SPDX-License-Identifier: Apache-2.0
"""A config of every family, read as vLLM's and Transformers' loaders do, or refused."""

import copy

import pytest
from released_configs import (
    A2D_QWEN2,
    A2D_QWEN3,
    DREAM,
    DREAM_REASONER,
    FAST_DLLM,
    LLADA,
    LLADA2,
    LLADA2_2,
    LLADA_MOE,
    NEMOTRON,
    RND1,
    SDAR,
    SDAR_MOE,
    STABLE_DIFFCODER,
)

from vllm_dlm.model_executor.models.tables import HF_CONFIGS
from vllm_dlm.registry import load

A2D_LLAMA = (
    A2D_QWEN3
    | {"architectures": ["A2DLlamaLMHeadModel"], "model_type": "a2d-llama"}
    | {"mask_token_id": 7, "dlm_class": "full"}
)
CONFIGS = {
    "llada": LLADA,
    "llada_moe": LLADA_MOE,
    "llada2": LLADA2,
    "llada2_2": LLADA2_2,
    "dream": DREAM,
    "sdar": SDAR,
    "sdar_moe": SDAR_MOE,
    "fast_dllm": FAST_DLLM,
    "a2d_qwen3": A2D_QWEN3 | {"dlm_class": "full"},
    "a2d_qwen2": A2D_QWEN2 | {"dlm_class": "full"},
    "a2d_llama": A2D_LLAMA,
    "nemotron": NEMOTRON,
    "rnd1": RND1,
    "dream_reasoner": DREAM_REASONER,
    "stable_diffcoder": STABLE_DIFFCODER,
}


def read(fields, **kwargs):
    """The config that vLLM's and Transformers' loaders make of a config.json."""
    config_class = load(HF_CONFIGS[fields["model_type"]])
    return config_class.from_dict(copy.deepcopy(fields), **kwargs)


def refusal(fields, make=read) -> str:
    """The one sentence with which a config is refused."""
    with pytest.raises(ValueError) as error:
        make(fields)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text
