# SPDX-License-Identifier: Apache-2.0
"""Tiny random DiffusionGemma checkpoints, and one denoising step in transformers.

The layout is whatever transformers' own class saves. Nothing of this package is used.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSamplerConfig,
)

_TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    # As in the released model: heads of the full layer are wider, and its values
    # are its keys.
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "global_head_dim": 64,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "position_embedding_size": 64,
}
_SPECIAL = {"image_token_id": 125, "boi_token_id": 126, "eoi_token_id": 127}


def write_random_checkpoint(
    folder: str | Path, *, seed: int, canvas_length: int
) -> Path:
    """Write config.json, model.safetensors and generation_config.json; no tokenizer.

    The layers' outputs outweigh the embedding that they are added to. The head is
    tied: it would else predict the very token that the canvas holds.
    """
    torch.manual_seed(seed)
    config = DiffusionGemmaConfig(
        text_config=dict(_TEXT),
        vision_config=dict(_VISION),
        canvas_length=canvas_length,
        **_SPECIAL,
    )
    model = DiffusionGemmaForBlockDiffusion(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                # Not exactly one, or a forgotten factor would go unnoticed.
                gain = 3.0 if ".post_" in name else 1.0
                weight.copy_(gain + 0.1 * torch.randn_like(weight))
    model.generation_config = DiffusionGemmaGenerationConfig(
        max_denoising_steps=6,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1),
        t_min=0.4,
        t_max=0.8,
        stability_threshold=1,
        confidence_threshold=0.005,
        eos_token_id=1,
    )
    model.save_pretrained(folder)
    return Path(folder)


@torch.no_grad()
def denoise_once(folder: str | Path, prompt: list[int], canvas: list[int]) -> list[int]:
    """The best token of every canvas position after one step, greedily.

    Args:
        prompt: context, which attends causally.
        canvas: `canvas_length` tokens behind it, which see everything.
    """
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder).eval()
    output = model(
        input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([canvas])
    )
    return output.logits[0].argmax(-1).tolist()


_TORCHVISION = {
    "__init__.py": '__version__ = "0.28.0"\n',
    "io.py": "ImageReadMode = decode_image = None\n",
    "transforms/__init__.py": (
        "import enum\n"
        "InterpolationMode = enum.Enum('InterpolationMode', "
        "'NEAREST_EXACT BOX BILINEAR HAMMING BICUBIC LANCZOS')\n"
    ),
    "transforms/functional.py": "pil_to_tensor = None\n",
    "transforms/v2/__init__.py": "",
    "transforms/v2/functional.py": (
        "from torchvision.transforms import InterpolationMode\n"
    ),
}


def write_torchvision_stand_in(folder: str | Path) -> Path:
    """Write a package `torchvision` with the names that transformers imports.

    vLLM imports Gemma 4's image processor with the model. Text requests call nothing
    of it, and torchvision's builds on PyPI do not load beside a CPU build of torch.
    """
    folder = Path(folder)
    for name, text in _TORCHVISION.items():
        path = folder / "torchvision" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder
