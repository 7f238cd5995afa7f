# SPDX-License-Identifier: Apache-2.0
"""HF config of DreamReasoner-8B: Qwen3 that decodes in blocks, without a shift.

The released checkpoint has Dream's model type; `DreamConfig.from_dict` tells them apart
by `architectures`. It was made from Qwen3-8B-Base, and its config.json names block
length and mask id.
Source: DreamLM/DreamReasoner, arXiv 2606.19257. Fields and loop of the released code
were read in other projects' ports of it.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen3Config

from vllm_dlm.config.model import declare
from vllm_dlm.model_executor.models.declarations import fill, stop_ids
from vllm_dlm.model_executor.models.reading import Family, FamilyConfig, read

DREAM_REASONER_ARCHITECTURES = ("DreamForCausalLM",)
DREAM_REASONER_MASK_ID = 151669
DREAM_REASONER_STOP_IDS = (151645, 151643)
"""`<|im_end|>` and `<|endoftext|>`, Qwen3's."""


class DreamReasonerConfig(FamilyConfig, Qwen3Config):
    """DreamReasoner's configuration; `block_size` is its block length."""

    model_type = "Dream"
    family = Family(
        "DreamReasoner",
        DREAM_REASONER_ARCHITECTURES,
        computes={"use_qk_norm": (True,)},
        rope_theta=1e6,
    )

    def __init__(self, **kwargs: Any) -> None:
        read(self.family, kwargs)
        fill(kwargs, block_size=32, eos_token_id=151643)
        declare(
            self,
            kwargs,
            dlm_class="block",
            mask_token_id=DREAM_REASONER_MASK_ID,
            dlm_reference_confidence="drawn",
            dlm_block_length=kwargs["block_size"],
            dlm_block_origin="start",
            dlm_strategy_config={
                "threshold": 0.9,
                "strict": True,
                "at_least": "scheduled",
            },
            dlm_stop_ids=stop_ids(
                kwargs, DREAM_REASONER_MASK_ID, DREAM_REASONER_STOP_IDS
            ),
        )
        super().__init__(**kwargs)
