# SPDX-License-Identifier: Apache-2.0
"""Random checkpoints of any size: a diffusion model, and a Llama of equal size.

Both hold the same weights under their own tensor names (SDAR has two small norms more
in a layer). Scales are such that greedy decoding writes many different tokens and no
two scores tie: what is measured with them is speed, never accuracy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vllm_dlm.bench.gemma_checkpoint import write_gemma
from vllm_dlm.bench.shapes import RandomModel, Shape
from vllm_dlm.files.tensor_files import write_safetensors
from vllm_dlm.files.whole_files import write_json

LONGEST = 8192
"""Positions that the configs allow."""

_LLADA_NAMES = {
    "model.embed_tokens.": "model.transformer.wte.",
    "model.norm.": "model.transformer.ln_f.",
    "lm_head.": "model.transformer.ff_out.",
    "model.layers.": "model.transformer.blocks.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.o_proj": "attn_out",
    "self_attn.": "",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
"""Llama's tensor names -> LLaDA's, replaced in this order."""


def write_random(
    folder: Path, model: RandomModel, *, block_length: int, seed: int
) -> Path:
    """Write config.json and model.safetensors of a diffusion model; its folder.

    Args:
        block_length: models with block attention are declared with it; of
            DiffusionGemma it is the length of a canvas.
        seed: the same seed gives the same weights.
    """
    shape = model.shape
    if model.family == "diffusion_gemma":
        return write_gemma(folder, shape, canvas_length=block_length, seed=seed)
    weights = _weights(shape, seed)
    if model.family == "llada":
        weights = {llada_name(name): weight for name, weight in weights.items()}
    else:
        for layer in range(shape.layers):
            for part in ("q_norm", "k_norm"):
                name = f"model.layers.{layer}.self_attn.{part}.weight"
                # Normed, queries and keys owe their sharpness to these.
                weights[name] = torch.full((shape.head_dim,), 2.0)
    return _write(folder, diffusion_config(model, block_length), weights)


def write_autoregressive(folder: Path, shape: Shape, *, seed: int) -> Path:
    """Write a Llama with random weights of this shape; its folder."""
    return _write(folder, autoregressive_config(shape), _weights(shape, seed))


def diffusion_config(model: RandomModel, block_length: int) -> dict[str, Any]:
    """config.json of a diffusion model; `block_length` as in `write_random`."""
    shape = model.shape
    if model.family != "llada":
        return _llama_config(shape) | {
            "architectures": ["SDARForCausalLM"],
            "model_type": "sdar",
            "block_size": block_length,
        }
    return _common_config(shape) | {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": shape.width,
        "n_layers": shape.layers,
        "n_heads": shape.heads,
        "n_kv_heads": shape.kv_heads,
        "mlp_hidden_size": shape.mlp,
        "vocab_size": shape.vocabulary,
        "embedding_size": shape.vocabulary,
        "max_sequence_length": LONGEST,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
    }


def autoregressive_config(shape: Shape) -> dict[str, Any]:
    """config.json of a Llama of this shape."""
    return _llama_config(shape) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
    }


def llada_name(name: str) -> str:
    """LLaDA's name of a tensor, by Llama's."""
    for theirs, ours in _LLADA_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _llama_config(shape: Shape) -> dict[str, Any]:
    return _common_config(shape) | {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.mlp,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": LONGEST,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
    }


def _common_config(shape: Shape) -> dict[str, Any]:
    return {
        "mask_token_id": shape.vocabulary - 1,
        "eos_token_id": shape.vocabulary - 2,
        "bos_token_id": shape.vocabulary - 2,
        "pad_token_id": shape.vocabulary - 2,
        "torch_dtype": "float32",
    }


def _write(
    folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]
) -> Path:
    write_json(folder / "config.json", config)
    write_safetensors(folder / "model.safetensors", weights, {"format": "pt"})
    return folder


def _weights(shape: Shape, seed: int) -> dict[str, torch.Tensor]:
    """Under Llama's names."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, gain: float) -> torch.Tensor:
        # Inputs of unit variance give outputs of variance gain squared.
        values = torch.randn(rows, columns, generator=generator)
        return values * (gain / columns**0.5)

    width, mlp = shape.width, shape.mlp
    rows, rows_kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    embedding = torch.randn(shape.vocabulary, width, generator=generator)
    # Masked positions differ by what attention brings them: the less by their own.
    embedding[shape.vocabulary - 1] *= 0.3
    weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.ones(width),
        "lm_head.weight": normal(shape.vocabulary, width, 4.5),
    }
    for layer in range(shape.layers):
        name = f"model.layers.{layer}."
        weights |= {
            name + "input_layernorm.weight": torch.ones(width),
            name + "self_attn.q_proj.weight": normal(rows, width, 2.0),
            name + "self_attn.k_proj.weight": normal(rows_kv, width, 2.0),
            name + "self_attn.v_proj.weight": normal(rows_kv, width, 1.5),
            name + "self_attn.o_proj.weight": normal(width, rows, 1.5),
            name + "post_attention_layernorm.weight": torch.ones(width),
            name + "mlp.gate_proj.weight": normal(mlp, width, 1.5),
            name + "mlp.up_proj.weight": normal(mlp, width, 1.5),
            name + "mlp.down_proj.weight": normal(width, mlp, 1.0),
        }
    return weights
