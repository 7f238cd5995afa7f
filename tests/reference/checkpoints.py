# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints of every family, under its own released tensor names.

No test needs a download. LLaDA's own writer is in `reference.llada`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from reference.families import COMMON, FAMILIES, Family
from reference.llada import Draw, write_tokenizer
from reference.network import ARCHITECTURES, Architecture, head_size
from safetensors.torch import save_file

_TIED_EMBEDDING_STD = 0.2


def write_checkpoint(
    family: str,
    folder: str | Path,
    *,
    seed: int,
    head_dim: int = 32,
    logit_std: float = 4.5,
    eos_gain: float = 1.5,
    **changes: Any,
) -> Path:
    """Write config.json, model.safetensors and a tokenizer; return the folder.

    Args:
        family: a key of `FAMILIES`.
        head_dim: 32, 64 or 128; a CPU's attention kernels know few sizes.
        logit_std, eos_gain: as in `reference.llada.write_random_checkpoint`.
        changes: entries of config.json, which the weights follow.

    Raises:
        ValueError: there is no such family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is not one of {', '.join(FAMILIES)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(FAMILIES[family], head_dim, changes)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    weights = _random_weights(config, seed, logit_std, eos_gain)
    weights = _to_released(weights, ARCHITECTURES[FAMILIES[family].architecture])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(
        folder,
        vocab_size=config["vocab_size"],
        mask_token_id=config["mask_token_id"],
        eos_token_id=config["eos_token_id"],
        max_length=config["max_position_embeddings"],
    )
    return folder


def _config(family: Family, head_dim: int, changes: dict[str, Any]) -> dict[str, Any]:
    config = COMMON | family.config
    for key in family.lacks:
        del config[key]
    if family.names_head_dim:
        config["head_dim"] = head_dim
    else:
        config["hidden_size"] = config["num_attention_heads"] * head_dim
    config |= changes
    for key, value in family.per_layer.items():
        config.setdefault(key, [value] * config["num_hidden_layers"])
    return config | {
        "architectures": [family.architecture],
        "auto_map": family.auto_map,
        "model_type": family.model_type,
    }


def _random_weights(
    config: dict[str, Any], seed: int, logit_std: float, eos_gain: float
) -> dict[str, torch.Tensor]:
    """Under Qwen's names; scales as in `reference.llada`, where they are explained."""
    draw = Draw(seed)
    architecture = ARCHITECTURES[config["architectures"][0]]
    size, vocab = config["hidden_size"], config["vocab_size"]
    embedding = draw.embedding(vocab, size, config["mask_token_id"])
    weights = {"model.embed_tokens.weight": embedding}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        weights[name + "input_layernorm.weight"] = draw.near(size)
        weights |= _attention(draw, name + "self_attn.", config, architecture)
        weights[name + "post_attention_layernorm.weight"] = draw.near(size)
        dense = layer < config.get("first_k_dense_replace", 0)
        if architecture.router is None or dense:
            width = config["intermediate_size"]
            weights |= _feed_forward(draw, name + "mlp.", size, width)
        else:
            weights |= _experts(draw, name + "mlp.", config, architecture)

    final_norm = draw.near(size)
    head = draw.normal(vocab, size, logit_std)
    if config["tie_word_embeddings"]:
        # The embedding is the head. It is small, or a row's own token, added by the
        # residual stream, would predict itself; the final norm makes up for it.
        embedding *= _TIED_EMBEDDING_STD
        final_norm *= logit_std / (_TIED_EMBEDDING_STD * size**0.5)
        head = embedding
    else:
        weights["lm_head.weight"] = head
    head[config["eos_token_id"]] *= eos_gain
    weights["model.norm.weight"] = final_norm
    return weights


def _attention(
    draw: Draw, name: str, config: dict[str, Any], architecture: Architecture
) -> dict[str, torch.Tensor]:
    size, per_head = config["hidden_size"], head_size(config)
    rows = per_head * config["num_attention_heads"]
    rows_kv = per_head * config["num_key_value_heads"]
    weights = {
        name + "q_proj.weight": draw.normal(rows, size, 2.0),
        name + "k_proj.weight": draw.normal(rows_kv, size, 2.0),
        name + "v_proj.weight": draw.normal(rows_kv, size, 1.5),
        name + "o_proj.weight": draw.normal(size, rows, 1.5),
    }
    if architecture.query_key_norm:
        # Normed, queries and keys owe their sharpness to the norms' weights.
        weights[name + "q_norm.weight"] = draw.near(per_head, 2.0)
        weights[name + "k_norm.weight"] = draw.near(per_head, 2.0)
    if architecture.query_key_value_bias:
        for part, length in (("q", rows), ("k", rows_kv), ("v", rows_kv)):
            weights[f"{name}{part}_proj.bias"] = draw.normal(length, 1, 0.2).flatten()
    return weights


def _feed_forward(
    draw: Draw, name: str, size: int, width: int, gain: float = 1.0
) -> dict[str, torch.Tensor]:
    return {
        name + "gate_proj.weight": draw.normal(width, size, 1.5),
        name + "up_proj.weight": draw.normal(width, size, 1.5),
        name + "down_proj.weight": draw.normal(size, width, gain),
    }


def _experts(
    draw: Draw, name: str, config: dict[str, Any], architecture: Architecture
) -> dict[str, torch.Tensor]:
    size, experts = config["hidden_size"], config["num_experts"]
    width = config.get("moe_intermediate_size") or config["expert_intermediate_size"]
    # Router logits far apart: rounding must not turn the choice of experts.
    weights = {name + "gate.weight": draw.normal(experts, size, 2.0)}
    gain = 1.0 / config.get("routed_scaling_factor", 1.0)
    for expert in range(experts):
        prefix = f"{name}experts.{expert}."
        weights |= _feed_forward(draw, prefix, size, width, gain)
    if architecture.router == "grouped sigmoid":
        bias = draw.normal(experts, 1, 0.2).flatten()
        weights[name + "gate.expert_bias"] = bias
        width *= config["num_shared_experts"]
        weights |= _feed_forward(draw, name + "shared_experts.", size, width)
    return weights


def _to_released(
    weights: dict[str, torch.Tensor], architecture: Architecture
) -> dict[str, torch.Tensor]:
    """The same weights under the family's own names."""
    renamed = {}
    for name, weight in weights.items():
        if architecture.packs_query_key_value:
            if ".k_proj." in name or ".v_proj." in name:
                continue
            if ".q_proj." in name:
                others = [weights[name.replace("q_proj", f"{x}_proj")] for x in "kv"]
                name = name.replace(".self_attn.q_proj.", ".attention.query_key_value.")
                weight = torch.cat([weight, *others])
        for theirs, ours in architecture.names.items():
            name = name.replace(ours, theirs)
        renamed[name] = weight
    return renamed
