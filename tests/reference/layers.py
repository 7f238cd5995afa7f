# SPDX-License-Identifier: Apache-2.0
"""What every reference network is made of, in plain torch: one row of positions.

Shapes use n = rows computed, L = length of the whole row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class KVStore:
    """Keys (already rotated) and values of every position, for every layer.

    `keys[layer]` and `values[layer]` are [L, n_kv_heads, head_dim]. A row holds
    whatever the last forward that computed that position wrote there.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @classmethod
    def unwritten(
        cls, n_layers: int, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> KVStore:
        """`shape` [L, n_kv_heads, head_dim], full of NaN: reading such a row shows.

        (Softmax weights are never exactly zero for the rows that are seen, so a NaN
        key spreads into every logit.)
        """

        def empty() -> list[torch.Tensor]:
            return [torch.full(shape, torch.nan, dtype=dtype) for _ in range(n_layers)]

        return cls(empty(), empty())

    def __len__(self) -> int:
        return self.keys[0].shape[0]

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        self.keys = [key[:length] for key in self.keys]
        self.values = [value[:length] for value in self.values]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last dimension."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def rotation(
    positions: torch.Tensor, size: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [n, 1, size], of the RoPE angles at `positions` [n]."""
    exponent = torch.arange(0, size, 2, dtype=torch.float32)
    return rotation_by(positions, 1.0 / theta ** (exponent / size), dtype)


def rotation_by(
    positions: torch.Tensor, inverse_frequency: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [n, 1, size], by the inverse frequencies, [size / 2] float32.

    Angles are part of the model, not of the arithmetic: served models build them in
    float32, so a float64 run of the oracle must use the same ones.
    """
    angle = positions.float()[:, None] * inverse_frequency[None, :]
    angle = torch.cat([angle, angle], dim=-1)[:, None, :]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Neox rotation: the first half of a head pairs with its second half."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of [n, n_heads, head_dim] over [L, n_kv_heads, head_dim].

    Args:
        visible: [n, L] bool, True where a row sees a key; None is everywhere.

    Returns:
        [n, n_heads * head_dim].
    """
    if visible is not None:
        # Keys that nobody sees may be NaN (unwritten), and zero times NaN is NaN.
        seen = visible.any(0)
        k, v, visible = k[seen], v[seen], visible[:, seen]
    group = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T / q.shape[2] ** 0.5
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        heads.append(scores.softmax(dim=-1) @ v[:, head // group])
    return torch.cat(heads, dim=-1)
