# SPDX-License-Identifier: Apache-2.0
"""LLaDA in plain PyTorch, for training small models and as a reference.

A Llama whose attention sees both ways (arXiv 2502.09992). Its state dict has the
tensor names of LLaDA's own checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vllm_dlm.files.model_folders import (
    Config,
    check_room,
    check_weights,
    read_all_weights,
)
from vllm_dlm.training.attention import Seen, attend, combine
from vllm_dlm.training.network import TrainedNetwork

# Wider than the 0.02 of large models: with 128 dimensions that learns slowly.
INIT_STD = 0.06


@dataclass(frozen=True)
class LLaDAShape:
    """Sizes of a LLaDA model, with LLaDA's own field names."""

    vocab_size: int
    d_model: int = 128
    n_layers: int = 5
    n_heads: int = 4
    mlp_hidden_size: int = 384
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_sequence_length: int = 1024

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole network without its norms."""
        layer = 4 * self.d_model**2 + 3 * self.d_model * self.mlp_hidden_size
        return 2 * self.vocab_size * self.d_model + self.n_layers * layer


class LLaDABlock(nn.Module):
    """A layer: attention over the whole row, then SwiGLU."""

    def __init__(self, shape: LLaDAShape) -> None:
        super().__init__()
        size, inner = shape.d_model, shape.mlp_hidden_size
        self.n_heads = shape.n_heads
        self.attn_norm = nn.RMSNorm(size, eps=shape.rms_norm_eps)
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.attn_out = nn.Linear(size, size, bias=False)
        self.ff_norm = nn.RMSNorm(size, eps=shape.rms_norm_eps)
        self.ff_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.ff_out = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Seen) -> Tensor:
        rows, length, size = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(rows, length, self.n_heads, -1).transpose(1, 2)

        h = self.attn_norm(x)
        query = _rotate(heads(self.q_proj(h)), cos, sin)
        key = _rotate(heads(self.k_proj(h)), cos, sin)
        value = heads(self.v_proj(h))
        h = attend(query, key, value, seen, self.training)
        x = x + self.attn_out(h.transpose(1, 2).reshape(rows, length, size))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class LLaDAModel(TrainedNetwork):
    """The whole model; `forward` gives the logits of every position."""

    cos: Tensor
    sin: Tensor
    checkpointing = False
    """Whether training computes each layer twice, and keeps its input only."""

    def __init__(self, shape: LLaDAShape) -> None:
        super().__init__()
        self.shape = shape
        size = shape.d_model
        transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(shape.vocab_size, size),
                "blocks": nn.ModuleList(
                    LLaDABlock(shape) for _ in range(shape.n_layers)
                ),
                "ln_f": nn.RMSNorm(size, eps=shape.rms_norm_eps),
                "ff_out": nn.Linear(size, shape.vocab_size, bias=False),
            }
        )
        # LLaDA's names begin with "model.transformer.".
        self.model = nn.ModuleDict({"transformer": transformer})
        self._init_weights()
        head_dim = size // shape.n_heads
        # Tables that no checkpoint has: they are on the CPU even where the weights are
        # on the meta device.
        steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
        steps = steps / head_dim
        positions = torch.arange(
            shape.max_sequence_length, dtype=torch.float32, device="cpu"
        )
        angles = torch.outer(positions, shape.rope_theta**-steps).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @property
    def head_dim(self) -> int:
        """Numbers of a query of one head."""
        return self.shape.d_model // self.shape.n_heads

    def _init_weights(self) -> None:
        residual_scale = (2 * self.shape.n_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = "attn_out" in name or (
                    "blocks" in name and "ff_out" in name
                )
                nn.init.normal_(
                    parameter, std=INIT_STD * (residual_scale if into_residual else 1.0)
                )

    def hidden(
        self,
        input_ids: Tensor,
        valid: Tensor | None = None,
        *,
        seen: Seen = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        return self.hidden_states(input_ids, combine(seen, valid), positions)[-1]

    def hidden_states(
        self, input_ids: Tensor, seen: Seen, positions: Tensor | None = None
    ) -> list[Tensor]:
        """What each layer hands on, [rows, length, d_model] each.

        Args:
            input_ids: Token ids [rows, length].
            seen: As of `attend`.
            positions: Position ids [rows or 1, length]; by default 0, 1, 2, ...
        """
        transformer: Any = self.model["transformer"]
        if positions is None:
            length = input_ids.shape[1]
            cos, sin = self.cos[:length], self.sin[:length]
        else:
            cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        x = transformer["wte"](input_ids)
        states = []
        for block in transformer["blocks"]:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, cos, sin, seen, use_reentrant=False)
            else:
                x = block(x, cos, sin, seen)
            states.append(x)
        return states

    def head(self, hidden: Tensor) -> Tensor:
        transformer: Any = self.model["transformer"]
        return transformer["ff_out"](transformer["ln_f"](hidden))


def load_llada(
    model_dir: str | Path, dtype: torch.dtype | None = torch.float32
) -> LLaDAModel:
    """Load a folder in LLaDA's layout, to evaluate it or to train it on.

    Args:
        model_dir: The folder; its weights are in one file or in several.
        dtype: Type of the weights in memory; None for that which they are stored in.

    Raises:
        ValueError: its files are missing, or do not fit together.
    """
    config = Config(model_dir)
    shape = read_shape(config)
    tensors = read_all_weights(model_dir)
    check_room(shape.num_parameters, tensors, config)
    # Without memory for weights that are replaced at once.
    with torch.device("meta"):
        model = LLaDAModel(shape)
    check_weights(tensors, model, model_dir)
    state = {name: tensors.pop(name).to(dtype) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def read_shape(config: Config) -> LLaDAShape:
    """The sizes that a config.json in LLaDA's layout says.

    Raises:
        ValueError: one is missing, or is no size.
    """
    return LLaDAShape(
        vocab_size=config.size("vocab_size"),
        d_model=config.size("d_model"),
        n_layers=config.layers("n_layers"),
        n_heads=config.size("n_heads"),
        mlp_hidden_size=config.size("mlp_hidden_size"),
        rope_theta=config.number("rope_theta"),
        rms_norm_eps=config.number("rms_norm_eps"),
        max_sequence_length=config.size("max_sequence_length"),
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # Half rotation (neox), computed in float32 as in LLaDA.
    y = x.float()
    left, right = y.chunk(2, dim=-1)
    return (y * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)
