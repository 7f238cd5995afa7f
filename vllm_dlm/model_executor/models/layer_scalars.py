# SPDX-License-Identifier: Apache-2.0
"""DiffusionGemma's layer scalars: one for rows of text, another for rows of a canvas.

Each layer multiplies its output by a scalar that a checkpoint holds twice, for prompt
and finished text (`encoder.language_model`) and for the canvas (`decoder`). vLLM has
one buffer for both. Where the two differ, each row gets its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

_NAME = re.compile(
    r"model\.(encoder\.language_model|decoder)\.layers\.(\d+)\.layer_scalar"
)


class LayerScalars:
    """The pairs of scalars in a checkpoint, noted while it is loaded."""

    def __init__(self) -> None:
        self.text: dict[int, float] = {}
        """Layer -> scalar of rows of prompt and finished text."""
        self.canvas: dict[int, float] = {}
        """Layer -> scalar of rows of a canvas that is being denoised."""

    def noted(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors, in the same order."""
        for name, tensor in weights:
            if found := _NAME.fullmatch(name):
                scalars = self.canvas if found[1] == "decoder" else self.text
                scalars[int(found[2])] = float(tensor.reshape(-1)[0])
            yield name, tensor

    def unequal(self) -> list[int]:
        """The layers whose two scalars differ, in rising order."""
        both = self.text.keys() & self.canvas.keys()
        return sorted(i for i in both if self.text[i] != self.canvas[i])

    def install(self, layers: Sequence[nn.Module], is_canvas: torch.Tensor) -> None:
        """Give each row its own scalar, in the layers whose two differ.

        The layers' own buffers become 1, so that nothing is multiplied twice. May be
        called again, when other weights were loaded.

        Args:
            layers: vLLM's Gemma 4 layers; each returns (hidden [n, H], residual).
            is_canvas: [rows, 1] bool, rows of a forward that are of a canvas; as many
                as a forward may have. Whoever prepares a forward writes it.
        """
        for index in sorted(self.text.keys() & self.canvas.keys()):
            layer: Any = layers[index]
            scalars = (self.text[index], self.canvas[index])
            if not hasattr(layer, "dlm_is_canvas"):
                if scalars[0] == scalars[1]:
                    continue
                # As buffers, so that a compiled forward reads them where they are.
                layer.register_buffer("dlm_is_canvas", is_canvas, persistent=False)
                for name in _SCALARS:
                    ones = torch.ones_like(layer.layer_scalar)
                    layer.register_buffer(name, ones, persistent=False)
                layer.register_forward_hook(_scale)
            for name, value in zip(_SCALARS, scalars, strict=True):
                getattr(layer, name).fill_(value)
            layer.layer_scalar.fill_(1)


_SCALARS = ("dlm_text_scalar", "dlm_canvas_scalar")


def _scale(layer: Any, args: Any, output: tuple[torch.Tensor, Any]) -> Any:
    """A forward hook: multiplies each row of a layer's output by its scalar."""
    hidden, residual = output
    scalars = torch.where(
        layer.dlm_is_canvas[: hidden.shape[0]],
        layer.dlm_canvas_scalar,
        layer.dlm_text_scalar,
    )
    return hidden * scalars, residual
