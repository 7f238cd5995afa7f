# SPDX-License-Identifier: Apache-2.0
"""Block-causal models in SDAR's layout, for training: Qwen3 under a mask of blocks.

A token sees its own block of B tokens and all blocks left of it; blocks are counted
from the first token (SDAR, arXiv 2510.06303). So what stands left of a block does not
change with what follows, and a served model keeps its keys and values.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM

from vllm_dlm.model_executor.models.sdar_config import SDARConfig
from vllm_dlm.tasks import tokenizer
from vllm_dlm.training.decoders import DecoderModel, load_decoder
from vllm_dlm.training.tiny.export import (
    decoder_config,
    write_folder,
)
from vllm_dlm.training.tiny.llada_modeling import INIT_STD, LLaDAShape
from vllm_dlm.training.weights import sizes_of, write_like


class BlockCausalModel(DecoderModel):
    """transformers' Qwen3 whose tokens see the blocks up to their own."""

    network: Qwen3ForCausalLM

    def __init__(self, network: Qwen3ForCausalLM) -> None:
        super().__init__(network, network.config.dlm_block_length)

    @property
    def config(self) -> SDARConfig:
        return self.network.config

    @property
    def shape(self) -> LLaDAShape:
        """Its sizes, as LLaDA names them."""
        return LLaDAShape(
            vocab_size=self.config.vocab_size,
            d_model=self.config.hidden_size,
            n_layers=self.config.num_hidden_layers,
            n_heads=self.config.num_attention_heads,
            mlp_hidden_size=self.config.intermediate_size,
            rope_theta=self.config.rope_parameters["rope_theta"],
            rms_norm_eps=self.config.rms_norm_eps,
            max_sequence_length=self.config.max_position_embeddings,
        )


def make_block_causal(shape: LLaDAShape, block_length: int) -> BlockCausalModel:
    """An untrained model with the built-in tokenizer.

    Raises:
        ValueError: no tokens in a block.
    """
    if block_length < 1:
        raise ValueError(f"a block has at least 1 token, not {block_length}")
    config = SDARConfig(
        **make_sdar_config(shape, block_length), initializer_range=INIT_STD
    )
    return BlockCausalModel(Qwen3ForCausalLM(config))


def load_block_causal(
    model_dir: str | Path, dtype: torch.dtype | None = torch.float32
) -> BlockCausalModel:
    """Load a folder in the layout of SDAR, TraDo or TDAR for training, in eval mode.

    Args:
        model_dir: The folder.
        dtype: Type of the weights in memory; None for that which they are stored in.

    Raises:
        ValueError: weights are missing, or are not finite.
    """
    config = SDARConfig.from_pretrained(model_dir, name_or_path=str(model_dir))
    return BlockCausalModel(load_decoder(Qwen3ForCausalLM, model_dir, config, dtype))


def export_block_causal(
    model: BlockCausalModel,
    output_dir: str | Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a model of `make_block_causal` as a folder of an `SDARForCausalLM`.

    Args:
        model: The model.
        output_dir: Its folder.
        dtype: Type of the weights in the file; the engine computes in float32.
    """
    config = make_sdar_config(model.shape, model.config.dlm_block_length)
    write_folder(output_dir, model.tensors(), config, dtype=dtype)


def export_block_causal_like(
    model: BlockCausalModel, source: str | Path, output_dir: str | Path
) -> None:
    """Write new weights of a model; all else as in the folder it was loaded from."""
    tensors = model.tensors()
    # The block length may have been a part of the old folder's name.
    config = {"block_size": model.config.dlm_block_length}
    write_like(tensors.items(), sizes_of(tensors), source, output_dir, config=config)


def make_sdar_config(shape: LLaDAShape, block_length: int) -> dict[str, object]:
    """config.json of an `SDARForCausalLM` with the built-in tokenizer."""
    return {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "block_size": block_length,
        "head_dim": shape.d_model // shape.n_heads,
        "mask_token_id": tokenizer.MASK_ID,
        **decoder_config(shape),
    }
