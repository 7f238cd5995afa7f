# SPDX-License-Identifier: Apache-2.0
"""HF config of Dream-v0, Dream-Coder and DiffuCoder: Qwen2 with shifted logits.

Source: HKUNLP/Dream, arXiv 2508.15487; DiffuCoder, arXiv 2506.20639.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config

from vllm_dlm.config.model import declare
from vllm_dlm.model_executor.models.config_fields import NAMES
from vllm_dlm.model_executor.models.declarations import fill, stop_ids
from vllm_dlm.model_executor.models.reading import (
    QWEN2_BIASES,
    Family,
    FamilyConfig,
    read,
)

DREAM_MASK_ID = 151666
DREAM_STOP_IDS = (151645, 151643)
"""`<|im_end|>` and `<|endoftext|>`."""


class DreamConfig(FamilyConfig, Qwen2Config):
    """Dream's configuration: Qwen2's, and what the released one leaves to its class.

    Raises:
        ValueError: the checkpoint is a DreamReasoner, which has the same model type
            and a different network.
    """

    model_type = "Dream"
    family = Family("Dream", ("DreamModel",), computes=QWEN2_BIASES, rope_theta=1e6)

    def __init__(self, **kwargs: Any) -> None:
        named = kwargs.get("architectures")
        if NAMES.accepts(named) and "DreamForCausalLM" in (named or ()):
            raise ValueError(
                "this checkpoint is a DreamReasoner (DreamForCausalLM), which "
                "vllm-dlm does not implement: it shares the model type of Dream, but "
                "not the network; Dream-v0, Dream-Coder and DiffuCoder are supported"
            )
        read(self.family, kwargs)
        fill(kwargs, eos_token_id=151643, pad_token_id=151643)
        declare(
            self,
            kwargs,
            dlm_class="full",
            mask_token_id=DREAM_MASK_ID,
            dlm_reference_confidence="drawn",
            dlm_shift=1,
            dlm_strategy_config={"threshold": 0.9},
            dlm_other_strategies={"freedave": {"drafts": 8}},
            dlm_stop_ids=stop_ids(kwargs, DREAM_MASK_ID, DREAM_STOP_IDS),
        )
        super().__init__(**kwargs)
