# SPDX-License-Identifier: Apache-2.0
"""HF configs of SDAR, SDAR-MoE, TraDo and TDAR: Qwen3 that decodes in blocks.

The released config.json names neither the block length nor the mask token, and carries
training switches that mean nothing here.
Source: JetAstra/SDAR, arXiv 2510.06303; TraDo, arXiv 2509.06949.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import Qwen3Config, Qwen3MoeConfig

from vllm_dlm.config.model import declare
from vllm_dlm.model_executor.models.declarations import (
    checkpoint_name,
    fill,
    stop_ids,
)
from vllm_dlm.model_executor.models.reading import (
    Family,
    FamilyConfig,
    read,
)

SDAR_MASK_ID = 151669
SDAR_STOP_IDS = (151645, 151643)
"""`<|im_end|>` and `<|endoftext|>`, both in the released generation_config.json."""

_NAMED_BLOCK_LENGTHS = {"TDAR": 16}
_BLOCK_SUFFIX = re.compile(r"-b(\d+)(?!\w)")


class SDARConfig(FamilyConfig, Qwen3Config):
    """SDAR, TraDo and TDAR."""

    model_type = "sdar"
    family = Family(
        "SDAR",
        ("SDARForCausalLM",),
        computes={"use_qk_norm": (True,)},
        rope_theta=1e6,
    )

    def __init__(self, **kwargs: Any) -> None:
        read(self.family, kwargs)
        _declare_sdar(self, kwargs)
        super().__init__(**kwargs)


class SDARMoeConfig(FamilyConfig, Qwen3MoeConfig):
    """SDAR-30B-A3B."""

    model_type = "sdar_moe"
    family = Family(
        "SDAR-MoE",
        ("SDARMoeForCausalLM",),
        computes={"use_qk_norm": (True,), "num_experts": None},
        rope_theta=1e6,
    )

    def __init__(self, **kwargs: Any) -> None:
        read(self.family, kwargs)
        # Released as true; the default of Qwen3-MoE is false.
        fill(kwargs, norm_topk_prob=True)
        _declare_sdar(self, kwargs)
        super().__init__(**kwargs)


def block_length(given: dict[str, Any]) -> int:
    """Positions per block: `block_size`, else by the checkpoint's name, else 4."""
    if given.get("block_size") is not None:
        return int(given["block_size"])
    name = checkpoint_name(given)
    if match := _BLOCK_SUFFIX.search(name):
        return int(match[1])
    for family, length in _NAMED_BLOCK_LENGTHS.items():
        if family in name:
            return length
    return 4


def _declare_sdar(config: Any, given: dict[str, Any]) -> None:
    fill(given, eos_token_id=151643)
    declare(
        config,
        given,
        dlm_class="block",
        mask_token_id=SDAR_MASK_ID,
        dlm_reference_confidence="drawn",
        dlm_block_length=block_length(given),
        dlm_block_origin="start",
        dlm_strategy_config={
            "threshold": 0.9,
            "strict": True,
            "at_least": "scheduled",
        },
        dlm_other_strategies={"freedave": {"drafts": 8, "eager": True}},
        dlm_stop_ids=stop_ids(given, SDAR_MASK_ID, SDAR_STOP_IDS),
    )
