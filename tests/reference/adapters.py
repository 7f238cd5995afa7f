# SPDX-License-Identifier: Apache-2.0
"""Random low-rank adapters of a checkpoint, as peft writes them; and merged with it.

W + (alpha / r) B A, one matrix after the other.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_IN_LAYERS = re.compile(r"\.(?:blocks|layers)\.\d+\.")
_PREFIX = "base_model.model."


def is_in_layers(name: str) -> bool:
    """A matrix of a layer, but for routers and experts."""
    inside = _IN_LAYERS.search(name) and not re.search(
        r"\.experts\.|\.gate\.|\.router\.", name
    )
    return bool(inside)


def write_adapter(
    folder: Path,
    base: Path,
    *,
    seed: int,
    rank: int = 4,
    alpha: float = 6.0,
    std: float = 0.25,
    has: Callable[[str], bool] = is_in_layers,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Write an adapter of the checkpoint in `base`.

    Args:
        has: whether the tensor of this name gets one, if it is a matrix.

    Returns:
        Module -> A [rank, in], B [out, rank].
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, weight in sorted(load_file(base / "model.safetensors").items()):
        if weight.dim() == 2 and has(name):
            out, into = weight.shape
            pairs[name.removesuffix(".weight")] = (
                torch.randn(rank, into, generator=generator) * std,
                torch.randn(out, rank, generator=generator) * std,
            )
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in pairs}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return pairs


def merged(base: Path, adapter: Path) -> dict[str, Tensor]:
    """The checkpoint's tensors with an adapter's added."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    pairs = load_file(adapter / "adapter_model.safetensors")
    weights = load_file(base / "model.safetensors")
    return {name: _changed(name, weights[name], pairs, scale) for name in weights}


def _changed(
    name: str, weight: Tensor, pairs: Mapping[str, Tensor], scale: float
) -> Tensor:
    module = _PREFIX + name.removesuffix(".weight")
    a = pairs.get(f"{module}.lora_A.weight")
    if a is None:
        return weight
    return weight + scale * pairs[f"{module}.lora_B.weight"] @ a


def write_merged(folder: Path, base: Path, adapter: Path) -> Path:
    """A checkpoint of its own, of `base` with an adapter's matrices added."""
    shutil.copytree(base, folder)
    save_file(
        merged(base, adapter), folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder
