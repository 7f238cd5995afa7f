# SPDX-License-Identifier: Apache-2.0
"""The sizes of a network, and the arithmetic that rows through it take.

A multiplication and an addition are two floating-point operations. Norms, activations,
rotations and the softmax are left out: less than 1 % at the sizes that are served.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_dlm.messages import unknown


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense Llama-like network; the defaults have 60 M parameters."""

    width: int = 512
    """Width of the residual stream."""
    layers: int = 8
    heads: int = 8
    kv_heads: int = 8
    mlp: int = 1536
    vocabulary: int = 32000
    head_dim: int = 64

    @property
    def layer_parameters(self) -> int:
        """Parameters of all layers' matrices."""
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.width * self.mlp)

    @property
    def parameters(self) -> int:
        """Parameters of all matrices; embedding and lm_head are two of them."""
        return self.layer_parameters + 2 * self.width * self.vocabulary

    @property
    def numbers_per_token(self) -> int:
        """Numbers in the keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def flops(self, rows: float, pairs: float, head_rows: float) -> float:
        """Floating-point operations of some forwards.

        Args:
            rows: rows through the layers.
            pairs: keys that each of these rows attends to, summed over rows.
            head_rows: rows through lm_head.
        """
        attention = 4 * self.layers * self.heads * self.head_dim * pairs
        head = 2 * self.width * self.vocabulary * head_rows
        return 2 * self.layer_parameters * rows + attention + head

    @classmethod
    def from_hf_config(cls, config: Any) -> Shape | None:
        """The shape of a dense model; None where experts make rows differ."""
        if any(
            getattr(config, name, None)
            for name in ("num_experts", "num_local_experts", "n_routed_experts")
        ):
            return None
        heads = config.num_attention_heads
        return cls(
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            mlp=config.intermediate_size,
            vocabulary=config.vocab_size,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )


_FIELDS = {
    "d": "width",
    "layers": "layers",
    "heads": "heads",
    "mlp": "mlp",
    "vocab": "vocabulary",
}
"""Short name in `random:d=64,...` -> field of `Shape`."""

FAMILIES = ("llada", "sdar", "diffusion_gemma")


@dataclass(frozen=True)
class RandomModel:
    """A model of random weights, as named on the command line."""

    shape: Shape = Shape()
    family: str = "llada"
    """llada (full attention), sdar (block attention) or diffusion_gemma (random tokens
    are denoised; a mixture of experts)."""

    @classmethod
    def parse(cls, text: str) -> RandomModel:
        """Read `random-60m`, or either of `random:` and `random-60m:` with changes.

        `random:d=64,layers=2,heads=2,mlp=128,vocab=256,family=sdar`: what is not
        named is as in `random-60m`. Heads share the width evenly.

        Raises:
            ValueError: an unknown name, or sizes that do not fit together.
        """
        _, _, rest = text.partition(":")
        family, changes = "llada", {}
        for part in filter(None, rest.split(",")):
            name, _, value = part.partition("=")
            if name == "family":
                if value not in FAMILIES:
                    raise ValueError(
                        f"--model {text}: family {value!r} is not one of "
                        f"{', '.join(FAMILIES)}"
                    )
                family = value
                continue
            if name not in _FIELDS:
                raise ValueError(
                    f"--model {text}: {unknown(name, [*_FIELDS, 'family'])}"
                )
            if not value.isdigit() or int(value) < 1:
                raise ValueError(f"--model {text}: {name} must be a whole number >= 1")
            changes[_FIELDS[name]] = int(value)
        shape = Shape(**changes)
        heads = shape.heads
        if shape.width % (2 * heads):
            raise ValueError(
                f"--model {text}: the width {shape.width} must be a multiple of twice "
                f"the {heads} heads"
            )
        if shape.vocabulary < 8:
            raise ValueError(f"--model {text}: vocab must be at least 8")
        sizes = {**changes, "kv_heads": heads, "head_dim": shape.width // heads}
        return cls(Shape(**sizes), family)
