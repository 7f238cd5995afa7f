# SPDX-License-Identifier: Apache-2.0
"""Tiny random DiffusionGemma checkpoints, and their texts in transformers.

The layout is whatever transformers' own class saves, and the texts are those of its own
`generate`, whose random numbers the caller may choose. Nothing of this package is used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
)

Noise = Callable[[int, int], torch.Tensor]
"""From a canvas and a number of steps behind it, both from 0, to random numbers."""

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
WINDOW = _TEXT["sliding_window"]
_SCALARS = ((0.7, 1.2), (1.3, 0.8))
"""Of each layer: of rows of text, and of rows of a canvas."""
_SPECIAL = {"image_token_id": 125, "boi_token_id": 126, "eoi_token_id": 127}


def write_random_checkpoint(
    folder: str | Path,
    *,
    seed: int,
    canvas_length: int,
    gain: float = 3.0,
    vocab_size: int = _TEXT["vocab_size"],
) -> Path:
    """Write config.json, model.safetensors and generation_config.json; no tokenizer.

    Args:
        gain: of the layers' outputs. With the default these outweigh the embedding that
            they are added to. The head is tied: with less it predicts, more and more,
            the very token that the canvas holds.
    """
    torch.manual_seed(seed)
    config = DiffusionGemmaConfig(
        text_config=_TEXT | {"vocab_size": vocab_size},
        vision_config=dict(_VISION),
        canvas_length=canvas_length,
        **_SPECIAL,
    )
    model = DiffusionGemmaForBlockDiffusion(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                # Not exactly one, or a forgotten factor would go unnoticed.
                center = gain if ".post_" in name else 1.0
                weight.copy_(center + 0.1 * torch.randn_like(weight))
        for index, (text, canvas) in enumerate(_SCALARS):
            layers = model.model.encoder.language_model.layers
            layers[index].layer_scalar.fill_(text)
            model.model.decoder.layers[index].layer_scalar.fill_(canvas)
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


class _FedSampler(EntropyBoundSampler):
    """Transformers' sampler with given random numbers, for one request."""

    def __init__(self, *args: Any, noise: Noise, gumbel: Noise) -> None:
        super().__init__(*args)
        self.noise, self.gumbel = noise, gumbel
        self.canvas, self.step, self.is_renoising = -1, 0, False

    def initialize_canvas(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.is_renoising:
            self.canvas, self.step = self.canvas + 1, 0
        return self.noise(self.canvas, self.step)[None]

    def accept_canvas(
        self, current: Any, drawn: Any, logits: torch.Tensor, step: Any
    ) -> torch.Tensor:
        drawn = (logits + self.gumbel(self.canvas, self.step)).argmax(-1)
        self.step += 1
        return super().accept_canvas(current, drawn, logits, step)

    def renoise_canvas(self, *args: Any) -> torch.Tensor:
        self.is_renoising = True
        try:
            return super().renoise_canvas(*args)
        finally:
            self.is_renoising = False


@torch.no_grad()
def generate(
    folder: str | Path,
    prompt: list[int],
    canvases: int,
    noise: Noise,
    gumbel: Noise,
    **settings: Any,
) -> list[int]:
    """The tokens of some canvases, by transformers' own `generate`.

    Args:
        noise: [C] token ids: of canvas k, what it holds at first (step 0), and what
            step s - 1 puts where it accepts nothing (step s, from 1).
        gumbel: [C, V]: what step s of canvas k adds to the tempered logits; the largest
            sum is drawn.
        **settings: of the generation config, in place of the checkpoint's.
    """
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder).eval()

    def sampler(config: DiffusionGemmaGenerationConfig) -> EntropyBoundSampler:
        return _FedSampler(
            config.sampler_config,
            model.config.canvas_length,
            model.config.text_config.vocab_size,
            config.max_denoising_steps,
            noise=noise,
            gumbel=gumbel,
        )

    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model._prepare_sampler = sampler
    length = canvases * model.config.canvas_length
    model.generation_config.eos_token_id = None
    output = model.generate(torch.tensor([prompt]), max_new_tokens=length)
    return output.sequences[0, len(prompt) :].tolist()


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
