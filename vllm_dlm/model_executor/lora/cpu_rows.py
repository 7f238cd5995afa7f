# SPDX-License-Identifier: Apache-2.0
"""Adapters' matrices times rows, on a CPU.

vLLM's own functions for a CPU copy an adapter's matrix once for every row. They also
index the stack of adapters with a row's adapter, which is -1 for a row that has none:
in a batch where any row has an adapter, such rows get what the last place of the stack
holds. These multiply each run of rows with one adapter's matrices, once, and leave
rows without an adapter as they are.

Shapes: n rows, I inputs, O outputs, rank r, S places for adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.utils.torch_utils import direct_register_custom_op

NONE = -1
"""The adapter of a row that has none."""


def lora_shrink(
    x: Tensor, a: Tensor, y: Tensor, adapters: Tensor, scale: float
) -> None:
    """y = scale * x A^T, in place.

    Args:
        x: [n, I].
        a: [S, 1, r, I].
        y: [n, r], in the type that is computed in.
        adapters: [n or more] int64: places of the rows' adapters, or `NONE`.
    """
    for place, rows in _runs(adapters, len(x)):
        product = x[rows].to(y.dtype) @ a[place, 0].to(y.dtype).T
        y[rows] = product.mul_(scale)


def lora_expand(
    x: Tensor, b: Tensor, y: Tensor, adapters: Tensor, offset: int, add: bool
) -> None:
    """y[:, offset : offset + O] += x B^T, in place; = where `add` is false.

    Args:
        x: [n, r], in the type that is computed in.
        b: [S, 1, O, r].
        y: [n, offset + O or more].
        adapters: as of `lora_shrink`.
    """
    width = min(b.shape[2], y.shape[1] - offset)
    for place, rows in _runs(adapters, len(x)):
        product = x[rows] @ b[place, 0, :width].to(x.dtype).T
        part = y[rows, offset : offset + width]
        if add:
            part += product
        else:
            part.copy_(product)


def _runs(adapters: Tensor, count: int) -> Iterator[tuple[int, slice]]:
    """Neighbouring rows with one adapter: its place, and which rows they are."""
    places, lengths = torch.unique_consecutive(adapters[:count], return_counts=True)
    start = 0
    for place, length in zip(places.tolist(), lengths.tolist(), strict=True):
        if place != NONE:
            yield place, slice(start, start + length)
        start += length


def _nothing(*args: Any) -> None:
    """What compiling traces: all is done in place."""


# Operators, so that a compiled network calls them with each forward's adapters.
for _function in (lora_shrink, lora_expand):
    direct_register_custom_op(
        f"dlm_{_function.__name__}", _function, mutates_args=["y"], fake_impl=_nothing
    )


class LoraRows(PunicaWrapperCPU):
    """Which adapter each row of a forward has, and the products with their matrices."""

    def _update_base_metadata(self, *args: Any, **kwargs: Any) -> None:
        super()._update_base_metadata(*args, **kwargs)
        # Rows behind a batch's are padding, or of a forward that names no adapters.
        self._token_lora_indices[self.indices_len[0] :] = NONE

    def _apply_shrink(
        self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float
    ) -> None:
        torch.ops.vllm.dlm_lora_shrink(x, w_t_all, y, self._token_lora_indices, scale)

    def _apply_expand(
        self,
        y: Tensor,
        x: Tensor,
        w_t_all: Tensor,
        y_offset: int,
        y_slice_size: int,
        add_inputs: bool = True,
    ) -> None:
        torch.ops.vllm.dlm_lora_expand(
            x, w_t_all, y, self._token_lora_indices, y_offset, add_inputs
        )
