# SPDX-License-Identifier: Apache-2.0
"""Experts of a layer that a checkpoint stacks in one tensor, taken apart.

Released checkpoints have a tensor per expert and projection, which is what vLLM's
classes read:

    model.layers.1.mlp.experts.7.gate_proj.weight    [intermediate, hidden]

LLaDA2's trainer (dFactory, on VeOmni) stacks them per projection, Transformers 5 stacks
gate and up in one, gate first:

    model.layers.1.mlp.experts.gate_proj       [experts, intermediate, hidden]
    model.layers.1.mlp.experts.gate_up_proj    [experts, 2 * intermediate, hidden]
    model.layers.1.mlp.experts.down_proj       [experts, hidden, intermediate]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch

_STACKED = re.compile(
    r"^(?P<experts>.*\.experts)\.(?P<part>gate_proj|up_proj|down_proj|gate_up_proj)"
    r"(?:\.weight)?$"
)


def unstack(
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights`, those of stacked experts one by one."""
    for name, tensor in weights:
        yield from unstacked(name, tensor) or ((name, tensor),)


def unstacked(
    name: str, tensor: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]] | None:
    """A stacked tensor, one by one per expert and projection; None if it is none.

    Scales and other tensors of quantised experts are no weights and are left alone.
    """
    match = _STACKED.match(name)
    if match is None or tensor.dim() != 3:
        return None
    return _each(match["experts"], match["part"], tensor)


def _each(
    experts: str, part: str, stacked: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    for number, tensor in enumerate(stacked.unbind()):
        if part != "gate_up_proj":
            yield f"{experts}.{number}.{part}.weight", tensor
        elif len(tensor) % 2:
            # It cannot be halved: its shape is told of under the name of the first.
            yield f"{experts}.{number}.gate_proj.weight", tensor
        else:
            gate, up = tensor.chunk(2)
            yield f"{experts}.{number}.gate_proj.weight", gate
            yield f"{experts}.{number}.up_proj.weight", up
