# SPDX-License-Identifier: Apache-2.0
"""Random DiffusionGemma checkpoints, in the released layout.

transformers' own class makes and saves them, the tower for images included, which no
request of the benchmark uses. Layers' outputs outweigh the embeddings that they are
added to: head and embeddings are one matrix, and a canvas would stand still otherwise.
The sampler's numbers are the released ones, of which none ends such a canvas before its
last step.
"""

from __future__ import annotations

from pathlib import Path

import torch

from vllm_dlm.bench.shapes import Shape

LONGEST = 8192
"""Positions that the config allows."""
WINDOW = 1024
"""Of the sliding layers."""
EXPERTS, EXPERTS_OF_TOKEN = 4, 2
GAIN = 3.0
"""Of the layers' outputs."""
STEPS = 48


def write_gemma(folder: Path, shape: Shape, *, canvas_length: int, seed: int) -> Path:
    """Write config.json, model.safetensors and generation_config.json; the folder.

    Args:
        shape: of the text model. Each of its experts is a quarter as wide as its MLP.
        canvas_length: tokens of a canvas.
        seed: the same seed gives the same weights.
    """
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        DiffusionGemmaGenerationConfig,
        EntropyBoundSamplerConfig,
    )

    last = shape.layers - 1
    kinds = [
        "full_attention" if i == last or i % 6 == 5 else "sliding_attention"
        for i in range(shape.layers)
    ]
    text = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "layer_types": kinds,
        "sliding_window": WINDOW,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "global_head_dim": 2 * shape.head_dim,
        "num_experts": EXPERTS,
        "top_k_experts": EXPERTS_OF_TOKEN,
        "moe_intermediate_size": max(shape.mlp // 4, 1),
        "max_position_embeddings": LONGEST,
        # Inputs of unit variance give outputs of about 2.4 squared.
        "initializer_range": 2.4 / shape.width**0.5,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "position_embedding_size": 64,
    }
    config = DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=canvas_length,
        image_token_id=shape.vocabulary - 3,
        boi_token_id=shape.vocabulary - 2,
        eoi_token_id=shape.vocabulary - 1,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = DiffusionGemmaForBlockDiffusion(config)
        for name, weight in model.named_parameters():
            if weight.ndim == 1 and ".post_" in name:
                weight.fill_(GAIN)
    model.generation_config = DiffusionGemmaGenerationConfig(
        max_denoising_steps=STEPS,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1),
        t_min=0.4,
        t_max=0.8,
        stability_threshold=1,
        confidence_threshold=0.005,
        eos_token_id=1,
    )
    model.save_pretrained(folder)
    return folder
