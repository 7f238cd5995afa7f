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
from vllm_dlm.model_executor.models.dream_reasoner_config import (
    DREAM_REASONER_ARCHITECTURES,
    DreamReasonerConfig,
)
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

    DreamReasoner checkpoints have the same model type: `from_dict`, which every loader
    goes through, hands them over to `DreamReasonerConfig`.
    """

    model_type = "Dream"
    family = Family("Dream", ("DreamModel",), computes=QWEN2_BIASES, rope_theta=1e6)

    def __init__(self, **kwargs: Any) -> None:
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

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of a Dream or a DreamReasoner.

        `architectures` decides; without it, whether there is a block length.
        """
        named = config_dict.get("architectures")
        if named is None:
            is_reasoner = config_dict.get("block_size") is not None
        else:
            is_reasoner = NAMES.accepts(named) and not set(named).isdisjoint(
                DREAM_REASONER_ARCHITECTURES
            )
        if is_reasoner:
            return DreamReasonerConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)
