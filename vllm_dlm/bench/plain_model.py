# SPDX-License-Identifier: Apache-2.0
"""A diffusion model in plain PyTorch, eager, as the models' own repositories have it.

LLaDA (arXiv 2502.09992) and SDAR (arXiv 2510.06303): a Llama without the causal mask,
SDAR with norms on queries and keys. Attention is PyTorch's fused one, the rotation is
tabulated, keys and values are written into one buffer that is never copied: a loop
around it loses nothing to this file. Shapes use R = rows of a batch, n = positions
computed, L = positions with keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_dlm.bench.checkpoints import llada_name
from vllm_dlm.bench.shapes import Shape
from vllm_dlm.files.model_folders import (
    WEIGHTS,
    Config,
    check_weights,
    read_all_weights,
)
from vllm_dlm.files.whole_files import BadFile

ARCHITECTURES = ("LLaDAModelLM", "SDARForCausalLM")


class KeysValues:
    """Keys and values of every layer, [R, heads, L, size], written in place."""

    def __init__(
        self, shape: Shape, num_rows: int, length: int, dtype: torch.dtype
    ) -> None:
        size = (2, shape.layers, num_rows, shape.kv_heads, length, shape.head_dim)
        self.keys, self.values = torch.zeros(size, dtype=dtype)

    def write(
        self, layer: int, start: int, keys: Tensor, values: Tensor, end: int
    ) -> tuple[Tensor, Tensor]:
        """Write positions from `start` on; the keys and values left of `end`."""
        stop = start + keys.shape[2]
        self.keys[layer, :, :, start:stop] = keys
        self.values[layer, :, :, start:stop] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class _Layer(nn.Module):
    def __init__(self, shape: Shape, eps: float, norms_queries: bool) -> None:
        super().__init__()
        width, size = shape.width, shape.head_dim
        self.heads, self.kv_heads, self.size = shape.heads, shape.kv_heads, size
        self.input_layernorm = nn.RMSNorm(width, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=eps)
        attention, mlp = nn.Module(), nn.Module()
        attention.q_proj = nn.Linear(width, shape.heads * size, bias=False)
        attention.k_proj = nn.Linear(width, shape.kv_heads * size, bias=False)
        attention.v_proj = nn.Linear(width, shape.kv_heads * size, bias=False)
        attention.o_proj = nn.Linear(shape.heads * size, width, bias=False)
        attention.q_norm = nn.RMSNorm(size, eps=eps) if norms_queries else nn.Identity()
        attention.k_norm = nn.RMSNorm(size, eps=eps) if norms_queries else nn.Identity()
        mlp.gate_proj = nn.Linear(width, shape.mlp, bias=False)
        mlp.up_proj = nn.Linear(width, shape.mlp, bias=False)
        mlp.down_proj = nn.Linear(shape.mlp, width, bias=False)
        self.self_attn, self.mlp = attention, mlp

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        store: tuple[KeysValues, int, int, int] | None,
        mask: Tensor | None,
    ) -> Tensor:
        rows, length, _ = x.shape
        attention: Any = self.self_attn
        mlp: Any = self.mlp

        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(rows, length, heads, self.size)

        h = self.input_layernorm(x)
        query = attention.q_norm(split(attention.q_proj(h), self.heads))
        key = attention.k_norm(split(attention.k_proj(h), self.kv_heads))
        value = split(attention.v_proj(h), self.kv_heads).transpose(1, 2)
        query = _rotate(query.transpose(1, 2), *rotation)
        key = _rotate(key.transpose(1, 2), *rotation)
        if store is not None:
            kept, layer, start, end = store
            key, value = kept.write(layer, start, key, value, end)
        h = F.scaled_dot_product_attention(
            query, key, value, mask, enable_gqa=self.heads != self.kv_heads
        )
        x = x + attention.o_proj(h.transpose(1, 2).reshape(rows, length, -1))
        h = self.post_attention_layernorm(x)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))


class PlainModel(nn.Module):
    """The network; `forward` gives the logits of all positions that it computes.

    Args:
        config: of a folder of one of `ARCHITECTURES`.

    Raises:
        ValueError: another architecture.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        named = config.values.get("architectures")
        architecture = named[0] if isinstance(named, list) and named else None
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"the plain loop knows {' and '.join(ARCHITECTURES)}, not "
                f"{architecture}"
            )
        self.is_llada = architecture == "LLaDAModelLM"
        self.shape = shape = _llada_shape(config) if self.is_llada else _shape(config)
        self.mask_id = config.token_id("mask_token_id")
        self.eos_id = config.token_id("eos_token_id")
        has_blocks = config.has("block_size")
        self.block_length = config.size("block_size") if has_blocks else None
        eps = config.number("rms_norm_eps")
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(
            _Layer(shape, eps, not self.is_llada) for _ in range(shape.layers)
        )
        self.norm = nn.RMSNorm(shape.width, eps=eps)
        self.lm_head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.base = config.number("rope_theta")
        # What `engine.Counts` has by these names.
        self.rows = self.pairs = self.head_rows = self.forwards = 0

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype, length: int) -> PlainModel:
        """Read a checkpoint.

        Args:
            length: most positions of a row.

        Raises:
            ValueError: its files are missing, or do not fit together.
        """
        with torch.device("meta"):
            model = cls(Config(folder))
        weights = read_all_weights(folder)
        own = {}
        for name, _ in model.named_parameters():
            theirs = name if name.startswith("lm_head") else f"model.{name}"
            theirs = llada_name(theirs) if model.is_llada else theirs
            if theirs not in weights:
                raise BadFile(WEIGHTS, folder, f"they have no tensor {theirs!r}")
            own[name] = weights[theirs]
        check_weights(own, model, folder)
        model.load_state_dict(
            {name: weight.to(dtype) for name, weight in own.items()}, assign=True
        )
        size = model.shape.head_dim
        steps = torch.arange(0, size, 2, dtype=torch.float32) / size
        positions = torch.arange(length, dtype=torch.float32)
        angles = torch.outer(positions, model.base**-steps).repeat(1, 2)
        model.cos, model.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return model.eval()

    def forward(
        self,
        ids: Tensor,
        start: int = 0,
        store: KeysValues | None = None,
        end: int | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [R, n, vocab] of token ids [R, n] at positions from `start` on.

        Args:
            store: keys and values are written to it, and those left of `end` seen;
                without it, the n positions see each other.
            end: by default, one past the n positions.
            mask: [n, L] bool, True where a position may look; None is everywhere.
        """
        rows, length = ids.shape
        stop = start + length
        end = stop if end is None else end
        rotation = self.cos[start:stop], self.sin[start:stop]
        x = self.embed_tokens(ids)
        for index, layer in enumerate(self.layers):
            kept = None if store is None else (store, index, start, end)
            x = layer(x, rotation, kept, mask)
        self.forwards += 1
        self.rows += rows * length
        self.head_rows += rows * length
        keys = length if store is None else end
        self.pairs += rows * (length * keys if mask is None else int(mask.sum()))
        return self.lm_head(self.norm(x))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def _shape(config: Config) -> Shape:
    heads = config.size("num_attention_heads")
    width = config.size("hidden_size")
    return Shape(
        width=width,
        layers=config.layers("num_hidden_layers"),
        heads=heads,
        kv_heads=config.size("num_key_value_heads"),
        mlp=config.size("intermediate_size"),
        vocabulary=config.size("vocab_size"),
        head_dim=config.size("head_dim") if config.has("head_dim") else width // heads,
    )


def _llada_shape(config: Config) -> Shape:
    width, heads = config.size("d_model"), config.size("n_heads")
    return Shape(
        width=width,
        layers=config.layers("n_layers"),
        heads=heads,
        kv_heads=config.size("n_kv_heads", "n_heads"),
        mlp=config.size("mlp_hidden_size"),
        vocabulary=config.size("embedding_size", "vocab_size"),
        head_dim=width // heads,
    )
