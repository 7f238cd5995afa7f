# SPDX-License-Identifier: Apache-2.0
"""The other families' networks in plain torch: one model, described by differences.

All of them are Llama-like decoders under Qwen's tensor names (LLaDA2's and Nemotron's
own are renamed on loading). What sets one apart is its `Architecture`. Written from the
published configurations and checkpoint layouts, and from nothing of this package:
LLaDA-MoE (arXiv 2509.24389), LLaDA2 (arXiv 2512.15745), Dream (arXiv 2508.15487), SDAR
(arXiv 2510.06303), Fast-dLLM v2 (arXiv 2509.26328), Tiny-A2D (github.com/ZHZisZZ/dllm),
Nemotron-Labs-Diffusion (vLLM pull request #48279; YaRN, arXiv 2309.00071), RND1
(radicalnumerics/RND1-Base-0910), DreamReasoner (arXiv 2606.19257), Stable-DiffCoder
(arXiv 2601.15892).
Shapes use n = rows computed, L = length of the whole row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from reference.layers import (
    KVStore,
    attend,
    rms_norm,
    rotate,
    rotation,
    rotation_by,
)
from safetensors.torch import load_file


@dataclass(frozen=True)
class Architecture:
    """What a family's network does differently from a Llama."""

    query_key_norm: bool = False
    """RMS norm of each head's queries and keys, before the rotation."""
    query_key_value_bias: bool = False
    router: Literal["softmax", "renormalised softmax", "grouped sigmoid"] | None = None
    """How expert weights are made; None is a network without experts."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Parts of the released tensor names -> Qwen's."""
    packs_query_key_value: bool = False
    """Query, key and value rows are one tensor, `attention.query_key_value`."""


BAILING_NAMES = {
    "model.word_embeddings.": "model.embed_tokens.",
    ".attention.dense.": ".self_attn.o_proj.",
    ".attention.query_layernorm.": ".self_attn.q_norm.",
    ".attention.key_layernorm.": ".self_attn.k_norm.",
}
NEMOTRON_NAMES = {"encoder.": "model.", "diffusion_head.": "lm_head."}

ARCHITECTURES = {
    # LLaDA-MoE never renormalises, whatever norm_topk_prob in its config says.
    "LLaDAMoEModelLM": Architecture(query_key_norm=True, router="softmax"),
    "LLaDA2MoeModelLM": Architecture(
        query_key_norm=True,
        router="grouped sigmoid",
        names=BAILING_NAMES,
        packs_query_key_value=True,
    ),
    "SDARForCausalLM": Architecture(query_key_norm=True),
    "SDARMoeForCausalLM": Architecture(
        query_key_norm=True, router="renormalised softmax"
    ),
    "DreamModel": Architecture(query_key_value_bias=True),
    "Fast_dLLM_QwenForCausalLM": Architecture(query_key_value_bias=True),
    "A2DQwen3LMHeadModel": Architecture(query_key_norm=True),
    "A2DQwen2LMHeadModel": Architecture(query_key_value_bias=True),
    "A2DLlamaLMHeadModel": Architecture(),
    "NemotronLabsDiffusionModel": Architecture(names=NEMOTRON_NAMES),
    "RND1LM": Architecture(query_key_norm=True, router="renormalised softmax"),
    "DreamForCausalLM": Architecture(query_key_norm=True),
    "StableDiffcoderForCausalLM": Architecture(),
}
"""By config.json's `architectures`: `model_type` is not unique among families."""


def block_causal(length: int, block_length: int, origin: int = 0) -> torch.Tensor:
    """[length, length] bool: i sees j if j's block is i's or one to the left of it.

    Blocks of `block_length` positions begin at `origin`. Positions left of it are
    blocked backwards from there, so that the very first block may be shorter.
    """
    blocks = torch.tensor([(p - origin) // block_length for p in range(length)])
    return blocks[None, :] <= blocks[:, None]


def causal_context(length: int, start: int) -> torch.Tensor:
    """[length, length] bool: left of `start` causal, from there on everything."""
    positions = torch.arange(length)
    return (positions[None, :] <= positions[:, None]) | (positions[:, None] >= start)


def head_size(config: dict) -> int:
    """A config's head size; without the key, heads divide the hidden size."""
    return config.get("head_dim") or (
        config["hidden_size"] // config["num_attention_heads"]
    )


class TinyModel:
    """A checkpoint held as a dictionary of tensors, with one `forward`."""

    def __init__(self, config: dict, weights: dict[str, torch.Tensor]) -> None:
        name = config["architectures"][0]
        if name not in ARCHITECTURES:
            raise ValueError(f"the oracle knows {', '.join(ARCHITECTURES)}, not {name}")
        self.config = config
        self.architecture = ARCHITECTURES[name]
        self.mask_id: int = config["mask_token_id"]
        self.eos_id: int = config["eos_token_id"]
        self.vocab_size: int = config["vocab_size"]
        self.n_layers: int = config["num_hidden_layers"]
        self.n_heads: int = config["num_attention_heads"]
        self.n_kv_heads: int = config["num_key_value_heads"]
        self.head_dim = head_size(config)
        self.eps: float = config["rms_norm_eps"]
        self.weights = weights = self._renamed(weights)
        self.dtype = weights["model.embed_tokens.weight"].dtype

    @classmethod
    def from_folder(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32
    ) -> TinyModel:
        """Load `config.json` and `model.safetensors`; for `dtype` see `TinyLLaDA`."""
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        return cls(config, {name: w.to(dtype) for name, w in weights.items()})

    def new_store(self, length: int) -> KVStore:
        """A store of `length` positions, none of them written."""
        shape = (length, self.n_kv_heads, self.head_dim)
        return KVStore.unwritten(self.n_layers, shape, self.dtype)

    @torch.no_grad()
    def forward(
        self,
        input_ids: list[int] | torch.Tensor,
        positions: list[int] | torch.Tensor | None = None,
        store: KVStore | None = None,
        visible: torch.Tensor | None = None,
        embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [n, vocab] of the given rows: row i's own, never shifted.

        `input_ids` and `positions` are [n]; positions default to 0..n-1. Without a
        store the keys are those of the n rows, L = n. With a store, the n rows' keys
        and values first overwrite it at `positions`, and L is its length.

        Args:
            visible: [n, L] bool, True where a row sees a key; None is everywhere.
            embeds: [n, hidden]: what is fed in place of the tokens' embeddings.
        """
        ids = torch.as_tensor(input_ids, dtype=torch.long)
        if positions is None:
            positions = torch.arange(len(ids))
        positions = torch.as_tensor(positions, dtype=torch.long)
        cos, sin = self._rotation(positions)
        query_scale = self._query_scale(positions)

        x = self.embedding[ids] if embeds is None else embeds
        for layer in range(self.n_layers):
            name = f"model.layers.{layer}."
            h = self._norm(x, name + "input_layernorm")
            q, k, v = self._query_key_value(h, name + "self_attn.", cos, sin)
            q = q * query_scale
            if store is not None:
                store.keys[layer][positions] = k
                store.values[layer][positions] = v
                k, v = store.keys[layer], store.values[layer]
            x = x + self._linear(attend(q, k, v, visible), name + "self_attn.o_proj")

            h = self._norm(x, name + "post_attention_layernorm")
            # First layers may be dense: a layer has experts if it has a router.
            if name + "mlp.gate.weight" in self.weights:
                x = x + self._experts(h, name + "mlp.", positions)
            else:
                x = x + self._feed_forward(h, name + "mlp.")

        tied = self.config["tie_word_embeddings"]
        x = self._norm(x, "model.norm")
        return self._linear(x, "model.embed_tokens" if tied else "lm_head")

    @property
    def embedding(self) -> torch.Tensor:
        """[vocab, hidden]: of tokens."""
        return self.weights["model.embed_tokens.weight"]

    def _rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, [n, 1, dimensions that are rotated]."""
        rope = self.config.get("rope_parameters") or {}
        rotated = int(self.head_dim * self.config.get("partial_rotary_factor", 1.0))
        if rope.get("rope_type") != "yarn":
            theta = float(self.config["rope_theta"])
            return rotation(positions, rotated, theta, self.dtype)
        cos, sin = rotation_by(positions, yarn_frequencies(rotated, rope), self.dtype)
        gain = yarn_gain(rope)
        return cos * gain, sin * gain

    def _query_scale(self, positions: torch.Tensor) -> torch.Tensor:
        """What queries are multiplied by, [n, 1, 1]: more the later, as in Llama 4."""
        rope = self.config.get("rope_parameters") or {}
        beta = rope.get("llama_4_scaling_beta", 0.0)
        length = rope.get("original_max_position_embeddings", 1)
        scale = 1 + beta * torch.log1p((positions // length).float())
        return scale.to(self.dtype)[:, None, None]

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x, self.weights[name + ".weight"], self.eps)

    def _linear(self, x: torch.Tensor, name: str, bias: bool = False) -> torch.Tensor:
        added = self.weights[name + ".bias"] if bias else None
        return F.linear(x, self.weights[name + ".weight"], added)

    def _query_key_value(
        self, x: torch.Tensor, name: str, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys (normed and rotated) and values, [n, heads, head_dim]."""
        bias = self.architecture.query_key_value_bias
        heads = {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads}
        q, k, v = (
            self._linear(x, f"{name}{part}_proj", bias).view(-1, n, self.head_dim)
            for part, n in heads.items()
        )
        if self.architecture.query_key_norm:
            q, k = self._norm(q, name + "q_norm"), self._norm(k, name + "k_norm")
        return _rotate_first(q, cos, sin), _rotate_first(k, cos, sin), v

    def _feed_forward(self, x: torch.Tensor, name: str) -> torch.Tensor:
        gate = F.silu(self._linear(x, name + "gate_proj"))
        up = self._linear(x, name + "up_proj")
        return self._linear(gate * up, name + "down_proj")

    def _experts(
        self, x: torch.Tensor, name: str, positions: torch.Tensor
    ) -> torch.Tensor:
        """Every expert of every row, weighted; most weights are zero."""
        weights = self.expert_weights(x, name, positions)
        total = torch.zeros_like(x)
        for expert in range(self.config["num_experts"]):
            output = self._feed_forward(x, f"{name}experts.{expert}.")
            total = total + weights[:, expert, None] * output
        if self.architecture.router == "grouped sigmoid":
            total = total + self._feed_forward(x, name + "shared_experts.")
        return total

    def expert_weights(
        self, x: torch.Tensor, name: str, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What each expert's output counts, [n, num_experts]; zero if not chosen.

        `x` [n, hidden_size] is what the router sees, `name` the prefix of its tensors.
        Published routers compute in float32; here that is the model's own dtype.
        LLaDA2.2 chooses in blocks, for which it needs the `positions` [n] of whole
        blocks: each block admits `expert_capacity` experts, those with the highest
        score that any of its positions has.
        """
        config = self.config
        capacity = config.get("expert_capacity", 0)
        logits = self._linear(x, name + "gate")
        scores = logits.softmax(dim=-1)
        selection = scores
        if self.architecture.router == "grouped sigmoid":
            scores = logits.sigmoid()
            # The bias says who is chosen, but not how much the chosen count.
            selection = scores + self.weights[name + "gate.expert_bias"]
        if self.architecture.router == "grouped sigmoid" and not capacity:
            groups = selection.view(len(x), config["n_group"], -1)
            group_scores = groups.topk(2, dim=-1).values.sum(-1)
            kept = group_scores.topk(config["topk_group"], dim=-1).indices
            dropped = torch.ones_like(group_scores, dtype=torch.bool)
            dropped.scatter_(1, kept, False)
            selection = groups.masked_fill(dropped[..., None], -torch.inf).flatten(1)
        if capacity:
            # Of the block that holds them, whatever else is in the row.
            blocks = positions // config["block_size"]
            for block in blocks.unique():
                inside = blocks == block
                best = selection[inside].amax(dim=0)
                admitted = best.topk(capacity).indices
                dropped = torch.ones_like(best, dtype=torch.bool)
                dropped[admitted] = False
                selection[inside] = selection[inside].masked_fill(dropped, -torch.inf)

        chosen = selection.topk(config["num_experts_per_tok"], dim=-1).indices
        weights = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))
        if self.architecture.router == "renormalised softmax":
            weights = weights / weights.sum(-1, keepdim=True)
        if self.architecture.router == "grouped sigmoid":
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            weights = weights * config["routed_scaling_factor"]
        return weights

    def _renamed(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same weights under Qwen's names, query, key and value apart."""
        rows = [self.n_heads, self.n_kv_heads, self.n_kv_heads]
        renamed = {}
        for name, weight in weights.items():
            for theirs, ours in self.architecture.names.items():
                name = name.replace(theirs, ours)
            if ".attention.query_key_value." in name:
                parts = weight.split([heads * self.head_dim for heads in rows])
                for letter, part in zip("qkv", parts, strict=True):
                    ours = f".self_attn.{letter}_proj."
                    renamed[name.replace(".attention.query_key_value.", ours)] = part
            else:
                renamed[name] = weight
        return renamed


def yarn_frequencies(size: int, rope: dict) -> torch.Tensor:
    """YaRN's inverse frequencies, [size / 2] float32.

    A dimension that turns often within the original context keeps its frequency; one
    that hardly turns is slowed down by `factor`. The paper goes from one to the other
    linearly in the number of turns; programs, and checkpoints with them, go linearly in
    the dimension's index, between whole dimensions.
    """
    theta, length = rope["rope_theta"], rope["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        """Index of the pair of dimensions that turns so often within `length`."""
        return size * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(dimension(rope["beta_fast"])), 0)
    high = min(math.ceil(dimension(rope["beta_slow"])), size - 1)
    index = torch.arange(size // 2, dtype=torch.float32)
    slowed = ((index - low) / (high - low)).clamp(0, 1)
    frequency = 1.0 / theta ** (2 * index / size)
    return frequency * (1 - slowed) + frequency / rope["factor"] * slowed


def yarn_gain(rope: dict) -> float:
    """What YaRN multiplies cos and sin by: 1 where both `mscale` are the same."""
    mscale, mscale_all_dim = (
        0.1 * rope[name] * math.log(rope["factor"]) + 1
        for name in ("mscale", "mscale_all_dim")
    )
    return mscale / mscale_all_dim


def _rotate_first(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Rotate as many dimensions as there are angles; the others carry no position."""
    size = cos.shape[-1]
    return torch.cat([rotate(x[..., :size], cos, sin), x[..., size:]], dim=-1)
