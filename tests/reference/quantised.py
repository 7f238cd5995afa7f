# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints quantised as compressed-tensors does it, but for some modules.

Weights become int8 with a scale per output channel; activations are quantised while the
model runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _INT8 | {"strategy": "channel", "dynamic": False},
            "input_activations": _INT8 | {"strategy": "token", "dynamic": True},
        }
    },
}


def quantise(
    folder: Path, is_left: Callable[[str], bool], ignore: list[str]
) -> dict[str, torch.Tensor]:
    """Quantise a checkpoint's linear layers in place.

    Args:
        is_left: whether the module of this name stays as it is.
        ignore: what config.json says of that.

    Returns:
        The weights that the new tensors stand for.
    """
    path = folder / "model.safetensors"
    new, stands_for = {}, {}
    for name, weight in load_file(path).items():
        module = name.removesuffix(".weight")
        if weight.dim() != 2 or is_left(module):
            new[name] = stands_for[name] = weight
            continue
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        rounded = (weight / scale).round()
        new[name] = rounded.to(torch.int8)
        new[f"{module}.weight_scale"] = scale
        stands_for[name] = rounded * scale
    save_file(new, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = SCHEME | {"ignore": ignore}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return stands_for
