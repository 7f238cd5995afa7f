# SPDX-License-Identifier: Apache-2.0
"""HF config of Fast-dLLM v2: Qwen2 in blocks of 32, each from the one before it.

Source: NVlabs/Fast-dLLM, arXiv 2509.26328.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config

from vllm_dlm.config.model import declare
from vllm_dlm.model_executor.models.declarations import fill, stop_ids
from vllm_dlm.model_executor.models.reading import (
    QWEN2_BIASES,
    Family,
    FamilyConfig,
    read,
)

FAST_DLLM_MASK_ID = 151665
FAST_DLLM_STOP_ID = 151645


class FastDLLMQwenConfig(FamilyConfig, Qwen2Config):
    """Fast-dLLM v2's configuration; `bd_size` is its block length."""

    model_type = "Fast_dLLM_Qwen"
    family = Family(
        "Fast-dLLM v2",
        ("Fast_dLLM_QwenForCausalLM",),
        computes=QWEN2_BIASES,
        rope_theta=1e6,
    )

    def __init__(self, **kwargs: Any) -> None:
        read(self.family, kwargs)
        fill(
            kwargs,
            bd_size=32,
            eos_token_id=FAST_DLLM_STOP_ID,
            pad_token_id=FAST_DLLM_STOP_ID,
        )
        declare(
            self,
            kwargs,
            dlm_class="block",
            mask_token_id=FAST_DLLM_MASK_ID,
            dlm_reference_confidence="drawn",
            dlm_block_length=kwargs["bd_size"],
            dlm_sub_block_length=8,
            dlm_shift=1,
            dlm_block_origin="start",
            dlm_strategy_config={"threshold": 0.9, "strict": True, "at_least": "best"},
            dlm_stop_ids=stop_ids(kwargs, FAST_DLLM_MASK_ID, (FAST_DLLM_STOP_ID,)),
        )
        super().__init__(**kwargs)
