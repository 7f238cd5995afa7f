# SPDX-License-Identifier: Apache-2.0
"""HF configs of the A2D models: autoregressive models taught to diffuse.

A checkpoint is trained in one of two ways, and only its name says which: `-mdlm-` sees
everything (full attention), `-bd3lm-` decodes in blocks of 32 counted from the prompt's
end (block attention). The mask token is the first id behind the base model's tokenizer;
that is inferred from its vocabulary. For Llama bases it is not known.
Source: ZHZisZZ/dllm.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from vllm_dlm.config.model import declare
from vllm_dlm.model_executor.models.declarations import (
    UNKNOWN_MASK_ID,
    checkpoint_name,
    stop_ids,
)
from vllm_dlm.model_executor.models.reading import (
    ON_OR_OFF,
    QWEN2_BIASES,
    Family,
    FamilyConfig,
    read,
)

A2D_QWEN3_MASK_ID = 151669
A2D_QWEN2_MASK_ID = 151665
QWEN_STOP_IDS = (151645, 151643)
"""`<|im_end|>` and `<|endoftext|>`."""


class A2DQwen3Config(FamilyConfig, Qwen3Config):
    """A2D from Qwen3."""

    model_type = "a2d-qwen3"
    family = Family(
        "A2D from Qwen3",
        ("A2DQwen3LMHeadModel",),
        computes={"use_qk_norm": (True,)},
        rope_theta=1e6,
    )

    def __init__(self, **kwargs: Any) -> None:
        read(self.family, kwargs)
        _declare_a2d(self, kwargs, A2D_QWEN3_MASK_ID, QWEN_STOP_IDS)
        super().__init__(**kwargs)


class A2DQwen2Config(FamilyConfig, Qwen2Config):
    """A2D from Qwen2.5."""

    model_type = "a2d-qwen2"
    family = Family(
        "A2D from Qwen2.5",
        ("A2DQwen2LMHeadModel",),
        computes=QWEN2_BIASES,
        rope_theta=1e6,
    )

    def __init__(self, **kwargs: Any) -> None:
        read(self.family, kwargs)
        _declare_a2d(self, kwargs, A2D_QWEN2_MASK_ID, QWEN_STOP_IDS)
        super().__init__(**kwargs)


class A2DLlamaConfig(FamilyConfig, LlamaConfig):
    """A2D from Llama; the checkpoint has to name its mask token."""

    model_type = "a2d-llama"
    family = Family(
        "A2D from Llama",
        ("A2DLlamaLMHeadModel",),
        computes={"attention_bias": ON_OR_OFF, "mlp_bias": ON_OR_OFF},
        windows_are_off=False,
    )

    def __init__(self, **kwargs: Any) -> None:
        read(self.family, kwargs)
        _declare_a2d(self, kwargs, UNKNOWN_MASK_ID, ())
        super().__init__(**kwargs)


def _declare_a2d(
    config: Any, given: dict[str, Any], mask_token_id: int, ids: tuple[int, ...]
) -> None:
    name = checkpoint_name(given).lower()
    is_known = given.get("dlm_class") or "mdlm" in name or "bd3lm" in name
    declare(
        config,
        given,
        dlm_class="block" if "bd3lm" in name else "full",
        mask_token_id=mask_token_id,
        dlm_shift=1 if given.get("right_shift_logits") else 0,
        dlm_schedule="rounded",
        dlm_stop_ids=stop_ids(given, mask_token_id, ids),
    )
    if not is_known:
        # Refused by `check_declarations`, unless --hf-overrides sets it first.
        config.dlm_class = None
