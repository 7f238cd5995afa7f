# SPDX-License-Identifier: Apache-2.0
"""Write models as Hugging Face folders; LLaDA's in its own layout and names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vllm_dlm.files.tensor_files import write_safetensors
from vllm_dlm.files.whole_files import write_json
from vllm_dlm.tasks import tokenizer
from vllm_dlm.training.tiny.llada_modeling import LLaDAModel, LLaDAShape

SaveTokenizer = Callable[[str | Path], None]


def export(
    model: LLaDAModel,
    output_dir: str | Path,
    *,
    max_canvas: int = 1024,
    save_tokenizer: SaveTokenizer = tokenizer.save_tokenizer,
    dtype: torch.dtype = torch.float32,
    more: Mapping[str, object] | None = None,
) -> None:
    """Write the weights, the configuration and the tokenizer of a model.

    Args:
        model: The model.
        output_dir: Its folder.
        max_canvas: The widest canvas that the model was trained on.
        save_tokenizer: Writes the tokenizer; its special tokens have llada-tiny's ids.
        dtype: Type of the weights in the file; the engine computes in float32.
        more: Further entries of config.json.
    """
    config = {**make_config(model, max_canvas), **(more or {})}
    write_folder(output_dir, model.state_dict(), config, save_tokenizer, dtype)


def write_folder(
    output_dir: str | Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, object],
    save_tokenizer: SaveTokenizer = tokenizer.save_tokenizer,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the weights, config.json and the tokenizer of a built-in model."""
    output_dir = Path(output_dir)
    _write_weights(output_dir, tensors, dtype)
    write_json(output_dir / "config.json", config)
    generation = {
        "bos_token_id": tokenizer.BOS_ID,
        "eos_token_id": tokenizer.EOS_ID,
        "pad_token_id": tokenizer.EOS_ID,
    }
    write_json(output_dir / "generation_config.json", generation)
    save_tokenizer(output_dir)


def make_config(model: LLaDAModel, max_canvas: int) -> dict[str, object]:
    """config.json with the field names of LLaDA's own."""
    shape = model.shape
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "activation_type": "silu",
        "alibi": False,
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": shape.d_model,
        # Read by vllm-dlm: no wider canvas was trained on.
        "dlm_max_canvas": max_canvas,
        "embedding_dropout": 0.0,
        "embedding_size": shape.vocab_size,
        "eos_token_id": tokenizer.EOS_ID,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": tokenizer.MASK_ID,
        "max_sequence_length": shape.max_sequence_length,
        "mlp_hidden_size": shape.mlp_hidden_size,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_heads,
        "n_layers": shape.n_layers,
        "pad_token_id": tokenizer.EOS_ID,
        "residual_dropout": 0.0,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": shape.rope_theta,
        "scale_logits": False,
        "torch_dtype": "float32",
        "use_cache": False,
        "vocab_size": shape.vocab_size,
        "weight_tying": False,
    }


def decoder_config(shape: LLaDAShape) -> dict[str, object]:
    """What config.json of a Llama or Qwen3 layout says of a network of this shape."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.BOS_ID,
        "eos_token_id": tokenizer.EOS_ID,
        "hidden_act": "silu",
        "hidden_size": shape.d_model,
        "intermediate_size": shape.mlp_hidden_size,
        "max_position_embeddings": shape.max_sequence_length,
        "num_attention_heads": shape.n_heads,
        "num_hidden_layers": shape.n_layers,
        "num_key_value_heads": shape.n_heads,
        "pad_token_id": tokenizer.EOS_ID,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def _write_weights(
    folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> None:
    floats = {name: tensor.detach().to(dtype) for name, tensor in tensors.items()}
    write_safetensors(folder / "model.safetensors", floats, {"format": "pt"})
