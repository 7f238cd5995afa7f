# SPDX-License-Identifier: Apache-2.0
"""The attention product of the networks that are trained here, and who computes it.

Three ways give the same numbers: a plain product, `scaled_dot_product_attention`
(SDPA) and xformers. Which of them is quickest depends on the device and on the mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST_PLAIN = 512
"""Up to this length, the backward pass of SDPA on a CPU takes longer than all the
rest, and that of the plain product does not. On a GPU it is never quicker: it keeps
the scores, [rows, heads, length, length]."""


@dataclass(frozen=True)
class Segments:
    """Rows that lie side by side in one row, each of which sees only itself.

    Args:
        lengths: Tokens of each, in their order; together they are the whole row.
        bias: xformers' BlockDiagonalMask of them.
    """

    lengths: tuple[int, ...]
    bias: Any

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> Segments:
        """Those of these lengths, for xformers, which has to be installed."""
        from xformers.ops.fmha import BlockDiagonalMask

        return cls(lengths, BlockDiagonalMask.from_seqlens(lengths, device=device))


Seen: TypeAlias = Tensor | Segments | None


def combine(seen: Seen, valid: Tensor | None) -> Seen:
    """What a network's `hidden` is given, for its layers' `attend`.

    Args:
        seen: Bool [rows or 1, length, length], or segments; None is everything.
        valid: Bool [rows, length], False at padding that nobody may attend to; None
            where there is none.
    """
    if isinstance(seen, Segments):
        assert valid is None, "packed rows have no padding"
        return seen
    if seen is not None:
        seen = seen[:, None]
    if valid is not None:
        keys = valid[:, None, None, :]
        seen = keys if seen is None else seen & keys
    return seen


def attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Seen, training: bool
) -> Tensor:
    """Attention of [rows, heads, length, head_dim] each; the same shape.

    Args:
        query, key, value: Of as many heads.
        seen: What a query sees: a mask, bool, broadcast to [rows, heads, length,
            length] and True at visible keys; segments; None is everything.
        training: Whether there will be a backward pass.
    """
    if isinstance(seen, Segments):
        return _xformers_attention(query, key, value, seen)
    if training and query.device.type == "cpu" and query.shape[2] <= LONGEST_PLAIN:
        return _plain_attention(query, key, value, seen)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen)


@cache
def has_xformers(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether xformers computes segments forwards and backwards there."""
    if device.type != "cuda" or find_spec("xformers") is None:
        return False
    from xformers.ops import fmha

    row = torch.empty(1, 16, 1, head_dim, device=device, dtype=dtype)
    bias = Segments.of((8, 8), device).bias
    inputs = fmha.Inputs(row, row, row, attn_bias=bias)
    return all(
        any(operator.supports(inputs) for operator in operators)
        for operators in (fmha.ALL_FW_OPS, fmha.ALL_BW_OPS)
    )


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None
) -> Tensor:
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
    if seen is not None:
        # Not minus infinity: padding may see nothing, and must not become NaN.
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def _xformers_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments
) -> Tensor:
    from xformers.ops import memory_efficient_attention

    # xformers has the heads behind the length.
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    output = memory_efficient_attention(query, key, value, attn_bias=segments.bias)
    return output.transpose(1, 2)
