# SPDX-License-Identifier: Apache-2.0
"""LLaDA in plain torch, one row at a time: the oracle every engine path is held to.

Written from the model's published configuration and checkpoint layout
(arXiv 2502.09992) and from nothing of this package, so that agreement means
something. No batching, no kernels: one request, one row, loops where they read
best. Shapes use n = rows computed, L = length of the whole row. The second half
writes random tiny checkpoints in LLaDA's own layout: no test needs a download.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from reference.layers import KVStore, attend, rms_norm, rotate, rotation
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

CHAT_TEMPLATE = (
    "{{ bos_token }} {% for message in messages %}"
    "<|start_header_id|> {{ message['role'] }} <|end_header_id|> "
    "{{ message['content'] | trim }} <|eot_id|> "
    "{% endfor %}<|start_header_id|> assistant <|end_header_id|>"
)


class TinyLLaDA:
    """A LLaDA checkpoint held as a dictionary of tensors, with one `forward`."""

    def __init__(self, config: dict, weights: dict[str, torch.Tensor]) -> None:
        expected = {
            "layer_norm_type": "rms",
            "activation_type": "silu",
            "block_type": "llama",
            "rope": True,
            "weight_tying": False,
            "include_bias": False,
            "include_qkv_bias": False,
            "attention_layer_norm": False,
        }
        for name, value in expected.items():
            if config[name] != value:
                raise ValueError(f"the oracle knows only {name}={value!r}")
        self.config = config
        self.weights = weights
        self.mask_id: int = config["mask_token_id"]
        self.eos_id: int = config["eos_token_id"]
        self.n_layers: int = config["n_layers"]
        self.n_heads: int = config["n_heads"]
        self.n_kv_heads: int = config["n_kv_heads"]
        self.head_dim: int = config["d_model"] // config["n_heads"]
        self.eps: float = config["rms_norm_eps"]
        self.dtype = weights["model.transformer.wte.weight"].dtype

    @classmethod
    def from_folder(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32
    ) -> TinyLLaDA:
        """Load `config.json` and `model.safetensors`.

        float32 is the oracle; float64 is for asking whether a decision of the
        float32 run was a near-tie that rounding alone could have turned.
        """
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        return cls(config, {name: w.to(dtype) for name, w in weights.items()})

    @property
    def embedding(self) -> torch.Tensor:
        """[vocab, d_model]: of tokens."""
        return self.weights["model.transformer.wte.weight"]

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
        embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [n, vocab] of the given rows; every row sees every key there is.

        `input_ids` and `positions` are [n]; positions default to 0..n-1. Without a
        store the keys are those of the n rows. With a store, the n rows' keys and
        values first overwrite the store at `positions`; then the rows attend to
        the *whole* store, so any position not recomputed is seen as it was last.
        `embeds` [n, d_model] are fed in place of the tokens' embeddings.
        """
        ids = torch.as_tensor(input_ids, dtype=torch.long)
        if positions is None:
            positions = torch.arange(len(ids))
        positions = torch.as_tensor(positions, dtype=torch.long)
        theta = float(self.config["rope_theta"])
        cos, sin = rotation(positions, self.head_dim, theta, self.dtype)

        w = self.weights
        x = self.embedding[ids] if embeds is None else embeds
        for layer in range(self.n_layers):
            block = f"model.transformer.blocks.{layer}."

            h = rms_norm(x, w[block + "attn_norm.weight"], self.eps)
            q = F.linear(h, w[block + "q_proj.weight"])
            k = F.linear(h, w[block + "k_proj.weight"])
            v = F.linear(h, w[block + "v_proj.weight"])
            q = rotate(q.view(-1, self.n_heads, self.head_dim), cos, sin)
            k = rotate(k.view(-1, self.n_kv_heads, self.head_dim), cos, sin)
            v = v.view(-1, self.n_kv_heads, self.head_dim)
            if store is not None:
                store.keys[layer][positions] = k
                store.values[layer][positions] = v
                k, v = store.keys[layer], store.values[layer]
            x = x + F.linear(attend(q, k, v), w[block + "attn_out.weight"])

            h = rms_norm(x, w[block + "ff_norm.weight"], self.eps)
            # LLaDA's names: ff_proj is the gate (silu), up_proj the up projection.
            gate = F.silu(F.linear(h, w[block + "ff_proj.weight"]))
            up = F.linear(h, w[block + "up_proj.weight"])
            x = x + F.linear(gate * up, w[block + "ff_out.weight"])

        x = rms_norm(x, w["model.transformer.ln_f.weight"], self.eps)
        # Not a block's ff_out: the one outside the blocks is the language-model head.
        return F.linear(x, w["model.transformer.ff_out.weight"])


def write_random_checkpoint(
    folder: str | Path,
    *,
    seed: int,
    d_model: int = 64,
    n_layers: int = 2,
    n_heads: int = 2,
    n_kv_heads: int = 2,
    mlp_hidden_size: int = 128,
    vocab_size: int = 128,
    mask_token_id: int = 120,
    eos_token_id: int = 121,
    max_sequence_length: int = 1024,
    logit_std: float = 4.5,
    eos_gain: float = 1.5,
) -> Path:
    """Write config.json, model.safetensors and a tokenizer; return the folder.

    The scales are chosen so that greedy decoding is eventful: confidences from
    about 0.1 to 0.99, many different tokens, an EOS now and then. They stay below
    the point where a float32 confidence rounds to 1.0, which would make exact ties.

    Args:
        logit_std: standard deviation of a logit; larger means more confident.
        eos_gain: factor on the head's EOS row. With 0 an EOS all but never wins;
            with 2 most seeds produce one in 32 tokens (seeds 0, 2 and 7 early).

    Token id i is the word "t<i>", except the special tokens (`special_tokens`).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "mlp_hidden_size": mlp_hidden_size,
        "mlp_ratio": 4,
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "rms_norm_eps": 1e-5,
        "layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "rope": True,
        "rope_theta": 500000.0,
        "rope_full_precision": True,
        "max_sequence_length": max_sequence_length,
        "vocab_size": vocab_size,
        "embedding_size": vocab_size,
        "weight_tying": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "attention_layer_norm": False,
        "block_type": "llama",
        "block_group_size": 1,
        "scale_logits": False,
        "input_emb_norm": False,
        "alibi": False,
        "mask_token_id": mask_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id,
        "flash_attention": False,
        "use_cache": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = _random_weights(config, seed, logit_std, eos_gain)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(
        folder,
        vocab_size=vocab_size,
        mask_token_id=mask_token_id,
        eos_token_id=eos_token_id,
        max_length=max_sequence_length,
    )
    return folder


class Draw:
    """Seeded random weights, on scales that keep a tiny network lively."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, rows: int, columns: int, gain: float) -> torch.Tensor:
        """Maps inputs of unit variance to outputs of variance gain squared."""
        values = torch.randn(rows, columns, generator=self.generator)
        return values * gain / columns**0.5

    def near(self, size: int, value: float = 1.0) -> torch.Tensor:
        """`value`, but not exactly: a forgotten norm weight must not go unnoticed."""
        return value * (1.0 + 0.1 * torch.randn(size, generator=self.generator))

    def embedding(self, vocab_size: int, size: int, mask_token_id: int) -> torch.Tensor:
        """Unit variance; the mask's row is small.

        Masked positions differ only through what attention brings them: a small mask
        embedding lets that decide, so that neighbours predict different tokens.
        """
        rows = torch.randn(vocab_size, size, generator=self.generator)
        rows[mask_token_id] *= 0.3
        return rows


def special_tokens(
    vocab_size: int, mask_token_id: int, eos_token_id: int
) -> dict[str, int]:
    """Token string -> id. The rest take the highest ids that are still free."""
    tokens = {"<|mdm_mask|>": mask_token_id, "<|endoftext|>": eos_token_id}
    free = (i for i in reversed(range(vocab_size)) if i not in tokens.values())
    names = [
        "<|startoftext|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ]
    return tokens | dict(zip(names, list(free), strict=False))


def _random_weights(
    config: dict, seed: int, logit_std: float, eos_gain: float
) -> dict[str, torch.Tensor]:
    draw = Draw(seed)
    d, ff, vocab = config["d_model"], config["mlp_hidden_size"], config["vocab_size"]
    d_kv = d // config["n_heads"] * config["n_kv_heads"]
    weights = {}
    weights["model.transformer.wte.weight"] = draw.embedding(
        vocab, d, config["mask_token_id"]
    )
    for layer in range(config["n_layers"]):
        block = f"model.transformer.blocks.{layer}."
        weights[block + "attn_norm.weight"] = draw.near(d)
        # Sharp attention scores (std 4): position, through RoPE, has to matter.
        weights[block + "q_proj.weight"] = draw.normal(d, d, 2.0)
        weights[block + "k_proj.weight"] = draw.normal(d_kv, d, 2.0)
        weights[block + "v_proj.weight"] = draw.normal(d_kv, d, 1.5)
        weights[block + "attn_out.weight"] = draw.normal(d, d, 1.5)
        weights[block + "ff_norm.weight"] = draw.near(d)
        weights[block + "ff_proj.weight"] = draw.normal(ff, d, 1.5)
        weights[block + "up_proj.weight"] = draw.normal(ff, d, 1.5)
        weights[block + "ff_out.weight"] = draw.normal(d, ff, 1.0)
    weights["model.transformer.ln_f.weight"] = draw.near(d)
    head = draw.normal(vocab, d, logit_std)
    head[config["eos_token_id"]] *= eos_gain
    weights["model.transformer.ff_out.weight"] = head
    return weights


def write_tokenizer(
    folder: Path,
    *,
    vocab_size: int,
    mask_token_id: int,
    eos_token_id: int,
    max_length: int,
) -> None:
    """Write tokenizer.json and tokenizer_config.json, with a chat template.

    Token id i is the word "t<i>", except the special tokens (`special_tokens`).
    """
    special = special_tokens(vocab_size, mask_token_id, eos_token_id)
    words = {f"t{i}": i for i in range(vocab_size)}
    by_id = {i: name for name, i in (words | special).items()}
    vocab = {name: i for i, name in by_id.items()}
    # Words outside the vocabulary become t0. It is not declared as unk_token to
    # transformers, which would hide every t0 from decoded text as "special".
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(s, normalized=False) for s in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mdm_mask|>",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(tokenizer_config, indent=2)
    )
