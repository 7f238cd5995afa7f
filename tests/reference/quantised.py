# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints quantised as released ones are, but for some modules.

Weights W [out, in] become whole numbers times a scale: of 8 bits with a scale per row
(compressed-tensors' int8 and fp8), of 4 bits with one per group of inputs (its w4a16,
GPTQ, AWQ). Tensors and their packing follow the formats' own descriptions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
"""Inputs that share a scale, in formats of 4 bits."""

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs lies in which 4 bits of a number."""


class Quantised(NamedTuple):
    """One matrix."""

    tensors: Mapping[str, Tensor]
    """By the names that stand in place of `weight`."""
    stands_for: Tensor


def _int8(weight: Tensor) -> Quantised:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    whole = (weight / scale).round()
    tensors = {"weight": whole.to(torch.int8), "weight_scale": scale}
    return Quantised(tensors, whole * scale)


def _fp8(weight: Tensor) -> Quantised:
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    small = (weight / scale).to(torch.float8_e4m3fn)
    tensors = {"weight": small, "weight_scale": scale}
    return Quantised(tensors, small.float() * scale)


def _by_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers 0 to 15 [out, in], scales [out, in / GROUP], what they stand for."""
    groups = weight.unflatten(1, (-1, GROUP))
    # Scales of 16 bits, as files have them.
    scale = (groups.abs().amax(dim=2) / 7).half().float()
    whole = (groups / scale[..., None]).round().clamp(-8, 7)
    return (whole + 8).flatten(1).int(), scale, (whole * scale[..., None]).flatten(1)


def _pack(values: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight neighbours along `dim` in one int32, the first in the lowest bits."""
    eights = values.movedim(dim, -1).unflatten(-1, (-1, 8)).long()
    packed = sum(eights[..., one] << (4 * at) for at, one in enumerate(order))
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).int()
    return packed.movedim(-1, dim).contiguous()


def _w4a16(weight: Tensor) -> Quantised:
    whole, scale, stands_for = _by_groups(weight)
    tensors = {
        "weight_packed": _pack(whole, 1),
        "weight_scale": scale.half(),
        "weight_shape": torch.tensor(weight.shape),
    }
    return Quantised(tensors, stands_for)


def _gptq(weight: Tensor) -> Quantised:
    whole, scale, stands_for = _by_groups(weight)
    rows, inputs = weight.shape
    # Zero points are stored less one.
    zeros = torch.full((inputs // GROUP, rows), 7)
    tensors = {
        "qweight": _pack(whole.T, 0),
        "qzeros": _pack(zeros, 1),
        "scales": scale.T.half().contiguous(),
        "g_idx": torch.arange(inputs).div(GROUP, rounding_mode="floor").int(),
    }
    return Quantised(tensors, stands_for)


def _awq(weight: Tensor) -> Quantised:
    whole, scale, stands_for = _by_groups(weight)
    rows, inputs = weight.shape
    zeros = torch.full((inputs // GROUP, rows), 8)
    tensors = {
        "qweight": _pack(whole.T, 1, _AWQ_ORDER),
        "qzeros": _pack(zeros, 1, _AWQ_ORDER),
        "scales": scale.T.half().contiguous(),
    }
    return Quantised(tensors, stands_for)


def _compressed(form: str, weights: dict[str, Any], inputs: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
    }


_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_FP8 = _INT8 | {"type": "float"}
_ROWS = {"strategy": "channel", "dynamic": False}
_TOKENS = {"strategy": "token", "dynamic": True}
_GROUPS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
_FOUR_BITS = {"bits": 4, "group_size": GROUP}

FORMATS: dict[str, tuple[Callable[[Tensor], Quantised], dict[str, Any], str]] = {
    # name: (how a matrix is written, quantization_config, its list of what is left out)
    "int8": (
        _int8,
        _compressed("int-quantized", _INT8 | _ROWS, _INT8 | _TOKENS),
        "ignore",
    ),
    "fp8": (
        _fp8,
        _compressed("float-quantized", _FP8 | _ROWS, _FP8 | _TOKENS),
        "ignore",
    ),
    "w4a16": (
        _w4a16,
        _compressed("pack-quantized", _GROUPS | {"group_size": GROUP}, None),
        "ignore",
    ),
    "gptq": (
        _gptq,
        {"quant_method": "gptq", "desc_act": False, "sym": True, **_FOUR_BITS},
        "",
    ),
    "awq": (
        _awq,
        {"quant_method": "awq", "zero_point": True, "version": "gemm", **_FOUR_BITS},
        "modules_to_not_convert",
    ),
}


def quantise(
    folder: Path,
    is_left: Callable[[str], bool],
    ignore: list[str],
    form: str = "int8",
) -> dict[str, Tensor]:
    """Quantise a checkpoint's linear layers in place.

    Args:
        is_left: whether the module of this name stays as it is.
        ignore: what config.json says of that.
        form: a key of `FORMATS`.

    Returns:
        The weights that the new tensors stand for.
    """
    write, scheme, leaves = FORMATS[form]
    path = folder / "model.safetensors"
    new, stands_for = {}, {}
    for name, weight in load_file(path).items():
        module = name.removesuffix(".weight")
        if weight.dim() != 2 or is_left(module):
            new[name] = stands_for[name] = weight
            continue
        matrix = write(weight)
        new.update({f"{module}.{field}": one for field, one in matrix.tensors.items()})
        stands_for[name] = matrix.stands_for
    save_file(new, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = dict(scheme)
    if leaves:
        config["quantization_config"][leaves] = ignore
    elif ignore:
        # GPTQ's rules: what a pattern behind a minus means is left as it was.
        rules = {f"-:.*{name.replace('.', chr(92) + '.')}$": {} for name in ignore}
        config["quantization_config"]["dynamic"] = rules
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return stands_for
