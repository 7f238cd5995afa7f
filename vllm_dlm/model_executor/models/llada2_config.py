# SPDX-License-Identifier: Apache-2.0
"""HF config of LLaDA2.0, 2.1 and 2.2, mini and flash, in Bailing-MoE-V2's names.

All versions share the architecture. LLaDA2.1 has the config of 2.0, was trained to
correct its own tokens, and is decoded so. Only a checkpoint's name tells it apart: one
with "LLaDA2.1" in it. LLaDA2.2 also deletes and inserts, by two tokens that its config
names, and chooses experts for a block before it does for a token (`expert_capacity`);
the groups of experts that its config still has mean nothing then.
Some released configs leave fields to the defaults of their own class, filled in here.
`<|role_end|>`, which ends a turn, is left to the tokenizer and generation_config.json:
its id is not in any config.json known to us.
Source: inclusionAI/LLaDA2.X, arXiv 2512.15745 and 2602.08676. LLaDA2.2's files were
read in other projects' descriptions of them.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from vllm_dlm.config.model import EDIT_TOKEN_FIELDS, declare
from vllm_dlm.model_executor.models.declarations import (
    checkpoint_name,
    fill,
    set_fields,
)
from vllm_dlm.model_executor.models.reading import (
    ON_OR_OFF,
    Family,
    FamilyConfig,
    read,
)

LLADA2_MASK_ID = 156895
LLADA2_EOS_ID = 156892

_MINI = {
    "vocab_size": 157184,
    "hidden_size": 2048,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 32768,
}
"""Sizes of LLaDA2.x-mini, the defaults of the released class."""

_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "use_qk_norm": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "norm_head": False,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "embedding_dropout": 0.0,
    "tie_word_embeddings": False,
    "eos_token_id": LLADA2_EOS_ID,
    "pad_token_id": LLADA2_EOS_ID,
}


class LLaDA2MoeConfig(FamilyConfig, PretrainedConfig):
    """LLaDA2.0, LLaDA2.1 and LLaDA2.2.

    Raises:
        ValueError: `rotary_dim` is not what the rotary factor makes of a head, or the
            groups of experts, or the experts of a block, do not add up.
    """

    model_type = "llada2_moe"
    family = Family(
        "LLaDA2",
        ("LLaDA2MoeModelLM",),
        computes={
            "use_qk_norm": ON_OR_OFF,
            "use_rmsnorm": (True,),
            "partial_rotary_factor": None,
            "num_experts": None,
            "expert_capacity": None,
            "num_shared_experts": None,
            "first_k_dense_replace": None,
            "n_group": None,
            "topk_group": None,
            "routed_scaling_factor": None,
            "score_function": ("sigmoid",),
            "moe_router_enable_expert_bias": (True,),
            "norm_topk_prob": (True,),
            "router_dtype": ("fp32", "float32"),
            "topk_method": ("noaux_tc",),
        },
        rope_theta=600000.0,
    )

    def __init__(self, **kwargs: Any) -> None:
        read(self.family, kwargs)
        fill(kwargs, **_MINI, **_COMMON)
        fill(kwargs, head_dim=kwargs["hidden_size"] // kwargs["num_attention_heads"])
        fill(kwargs, block_size=32, expert_capacity=0)
        _settle_rotary_dim(kwargs)
        if kwargs["expert_capacity"]:
            _check_capacity(kwargs)
            kwargs.update(n_group=1, topk_group=1)
        _check_groups(kwargs)
        kwargs["router_dtype"] = "fp32"
        # Announced in the released config, and switched off there.
        kwargs["sliding_window"] = None
        # Without it vLLM takes q and k norms for LayerNorm.
        kwargs["use_rmsnorm"] = True
        strategy, strategy_config = _strategy(kwargs)
        declare(
            self,
            kwargs,
            dlm_class="block",
            mask_token_id=LLADA2_MASK_ID,
            dlm_reference_confidence="drawn",
            dlm_block_length=kwargs["block_size"],
            dlm_block_origin="start",
            dlm_strategy=strategy,
            dlm_strategy_config=strategy_config,
        )
        set_fields(self, kwargs)
        super().__init__(**kwargs)


def _settle_rotary_dim(given: dict[str, Any]) -> None:
    """Say twice, as vLLM's class reads it, how much of a head is rotated."""
    rope, head = given["rope_parameters"], given["head_dim"]
    size, factor = given.get("rotary_dim"), rope.get("partial_rotary_factor")
    if size is None:
        size = int(head * (factor if factor is not None else 0.5))
    elif size > head or (factor is not None and size != int(head * factor)):
        raise ValueError(
            f"rotary_dim in the LLaDA2 config is {size}, and partial_rotary_factor "
            f"{factor} of a head of {head}: leave one of them out"
        )
    given["rotary_dim"] = size
    given["partial_rotary_factor"] = rope["partial_rotary_factor"] = size / head


def _check_groups(given: dict[str, Any]) -> None:
    experts, groups = given["num_experts"], given["n_group"]
    kept, chosen = given["topk_group"], given["num_experts_per_tok"]
    if not groups or experts % groups or not 0 < kept <= groups:
        raise ValueError(
            f"the LLaDA2 config has {experts} num_experts, n_group {groups} and "
            f"topk_group {kept}: experts come in n_group equal groups, of which "
            "topk_group are kept"
        )
    if chosen > experts // groups * kept:
        raise ValueError(
            f"num_experts_per_tok in the LLaDA2 config is {chosen}, more than the "
            f"{experts // groups * kept} experts of topk_group {kept} groups"
        )


def _check_capacity(given: dict[str, Any]) -> None:
    capacity, chosen = given["expert_capacity"], given["num_experts_per_tok"]
    if not chosen <= capacity <= given["num_experts"]:
        raise ValueError(
            f"expert_capacity in the LLaDA2 config is {capacity}: a block admits at "
            f"least the {chosen} experts of a token (num_experts_per_tok) and at most "
            f"all {given['num_experts']} (num_experts)"
        )


def _strategy(given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """How the checkpoint is decoded by default: strategy and parameters."""
    if all(given.get(name) is not None for name in EDIT_TOKEN_FIELDS):
        return "levenshtein", {}
    if "llada2.1" in checkpoint_name(given).lower():
        return "joint", {"preset": "quality"}
    return "threshold", {"threshold": 0.95, "strict": True, "at_least": "scheduled"}
