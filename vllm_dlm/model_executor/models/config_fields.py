# SPDX-License-Identifier: Apache-2.0
"""The fields of config.json that our classes read: their other names, their types.

Fields that nothing here reads are left to Transformers, or to nobody.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch

from vllm_dlm.config.model import EDIT_TOKEN_FIELDS, LETTERS, Attention

OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("d_model", "n_embd", "dim"),
    "num_hidden_layers": ("n_layers", "n_layer", "num_layers"),
    "num_attention_heads": ("n_heads", "n_head", "num_heads"),
    "num_key_value_heads": ("n_kv_heads", "n_kv_head", "num_kv_heads"),
    "intermediate_size": ("mlp_hidden_size", "ffn_hidden_size", "ffn_dim"),
    "head_dim": ("kv_channels", "d_head"),
    "max_position_embeddings": (
        "max_sequence_length",
        "max_seq_len",
        "max_seq_length",
        "n_positions",
        "n_ctx",
    ),
    "rms_norm_eps": ("layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
    "hidden_act": ("activation_type", "hidden_activation", "activation_function"),
    "tie_word_embeddings": ("weight_tying",),
    "rope_theta": ("rotary_emb_base", "rope_base"),
    "partial_rotary_factor": ("rotary_pct", "rotary_percent", "rotary_emb_fraction"),
    "layer_norm_type": ("norm_type", "normalization"),
    "use_qk_norm": ("qk_norm", "qk_layernorm", "attention_layer_norm"),
    "mask_token_id": ("mask_id", "mask_token_index"),
    "num_experts": ("num_local_experts", "n_routed_experts", "n_experts"),
    "num_experts_per_tok": ("num_experts_per_token", "moe_topk", "moe_router_topk"),
    "moe_intermediate_size": ("expert_intermediate_size", "moe_ffn_hidden_size"),
    "num_shared_experts": ("n_shared_experts",),
    "score_function": (
        "scoring_func",
        "scoring_function",
        "router_score_function",
        "moe_router_score_function",
    ),
    "moe_router_enable_expert_bias": ("use_expert_bias",),
    "n_group": ("num_expert_group", "n_groups", "moe_router_num_groups"),
    "topk_group": ("topk_groups", "moe_router_group_topk"),
    "routed_scaling_factor": ("moe_router_topk_scaling_factor",),
}
"""Standard name -> what other configs call the same thing."""


@dataclass(frozen=True)
class Kind:
    """What a field may hold."""

    expected: str
    """Words for people, behind "must be"."""
    accepts: Callable[[Any], bool]


_LARGEST = 2**31 - 1


def _is_whole(value: Any, least: int = -_LARGEST) -> bool:
    return (
        isinstance(value, int)
        and not isinstance(value, bool)
        and least <= value <= _LARGEST
    )


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number; no boolean is."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    )


def _are(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(accepts, value))


def _is_dtype(value: Any) -> bool:
    name = value.removeprefix("torch.") if isinstance(value, str) else ""
    return isinstance(value if not name else getattr(torch, name, None), torch.dtype)


COUNT = Kind("a positive whole number", lambda value: _is_whole(value, 1))
COUNT_OR_NONE = Kind(
    "a whole number, 0 or larger", lambda value: _is_whole(value, least=0)
)
SIZE = Kind(
    "a positive number", lambda value: is_number(value) and 0 < value <= _LARGEST
)
FRACTION = Kind(
    "a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1
)
NUMBER = Kind("a finite number", is_number)
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
NAME = Kind("a string", lambda value: isinstance(value, str))
TOKEN = Kind("a token id, which is a whole number", _is_whole)
TOKENS = Kind(
    "a token id or a list of token ids, which are whole numbers",
    lambda value: _is_whole(value) or _are(value, _is_whole),
)
LAYERS = Kind(
    "a list of layers' numbers, from 0",
    lambda value: _are(value, lambda one: _is_whole(one, 0)),
)
EACH_LAYER = Kind(
    "0 or 1, or a list of these with one for each layer",
    lambda value: value in (0, 1) or _are(value, lambda one: one in (0, 1)),
)
NAMES = Kind(
    "a list of strings",
    lambda value: _are(value, lambda one: isinstance(one, str)),
)
TABLE = Kind("a JSON object", lambda value: isinstance(value, Mapping))
TABLES = Kind(
    "a JSON object of JSON objects",
    lambda value: TABLE.accepts(value) and all(map(TABLE.accepts, value.values())),
)
DTYPE = Kind("the name of a torch dtype, as bfloat16", _is_dtype)


def one_of(*choices: Any) -> Kind:
    """One of `choices`, and of their types: 1 is not true."""
    return Kind(
        "one of " + ", ".join(map(str, choices)),
        lambda value: any(
            type(value) is type(choice) and value == choice for choice in choices
        ),
    )


KINDS: dict[str, Kind] = {
    **dict.fromkeys(
        (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "head_dim",
            "vocab_size",
            "embedding_size",
            "max_position_embeddings",
            "original_max_position_embeddings",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "dense_intermediate_size",
            "decoder_sparse_step",
            "rotary_dim",
            "block_size",
            "bd_size",
            "canvas_length",
            "dlm_block_length",
            "dlm_sub_block_length",
            "dlm_max_canvas",
            "dlm_draft_length",
        ),
        COUNT,
    ),
    **dict.fromkeys(
        (
            "num_experts",
            "num_shared_experts",
            "n_group",
            "topk_group",
            "first_k_dense_replace",
            "shared_expert_intermediate_size",
            "expert_capacity",
            "sliding_window",
            "max_window_layers",
            "pretraining_tp",
        ),
        COUNT_OR_NONE,
    ),
    **dict.fromkeys(
        (
            "rms_norm_eps",
            "rope_theta",
            "partial_rotary_factor",
            "routed_scaling_factor",
            "mlp_ratio",
        ),
        SIZE,
    ),
    **dict.fromkeys(
        (
            "attention_dropout",
            "embedding_dropout",
            "output_dropout",
            "router_aux_loss_coef",
        ),
        NUMBER,
    ),
    **dict.fromkeys(
        (
            "tie_word_embeddings",
            "norm_topk_prob",
            "output_router_logits",
            "use_cache",
            "right_shift_logits",
            "dlm_seeds",
        ),
        SWITCH,
    ),
    **dict.fromkeys(("model_type", "hidden_act", "dlm_strategy"), NAME),
    **dict.fromkeys(
        ("mask_token_id", "bos_token_id", "pad_token_id", *EDIT_TOKEN_FIELDS), TOKEN
    ),
    **dict.fromkeys(("eos_token_id", "dlm_stop_ids"), TOKENS),
    **dict.fromkeys(("architectures", "layer_types"), NAMES),
    **dict.fromkeys(
        (
            "rope_parameters",
            "rope_scaling",
            "quantization_config",
            "text_config",
            "dlm_options",
            "dlm_strategy_config",
        ),
        TABLE,
    ),
    "dlm_other_strategies": TABLES,
    **dict.fromkeys(("dtype", "torch_dtype"), DTYPE),
    "initializer_range": FRACTION,
    "mlp_only_layers": LAYERS,
    "moe_layer_freq": EACH_LAYER,
    "dlm_class": one_of(*get_args(Attention), *LETTERS),
    "dlm_shift": one_of(0, 1),
    "dlm_block_origin": one_of("start", "prompt"),
    "dlm_schedule": one_of("even", "rounded"),
    "dlm_reference_confidence": one_of("model", "drawn"),
}
"""Standard name -> what it may hold, where it is not null, which is left out."""


def check_kind(field: str, value: Any, source: str, spelled: str | None = None) -> None:
    """Refuse a value that `field` cannot hold; null and unknown fields pass.

    Args:
        field: its standard name.
        source: where it stands, behind "in": `the SDAR config`.
        spelled: the name that `source` has for it, if another one.

    Raises:
        ValueError: one sentence with field, value and what is expected.
    """
    kind = KINDS.get(field)
    if kind is not None and value is not None and not kind.accepts(value):
        raise ValueError(
            f"{spelled or field} in {source} is {shown(value)}; it must be "
            f"{kind.expected}"
        )


def shown(value: Any) -> str:
    """A value for a message, shortened; strings and booleans as JSON has them."""
    if isinstance(value, bool):
        return str(value).lower()
    return reprlib.repr(value)
