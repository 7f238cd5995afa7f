# SPDX-License-Identifier: Apache-2.0
"""Entropy-adaptive decoding in plain torch and transformers, one text at a time.

Written from arXiv 2502.06833, without the package: no cache, no batch, no engine. Every
token comes from a forward over the whole text.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 128
EOS = 0


def write_llama(
    folder: Path, seed: int, layers: int, sharpness: float = 3.0, vocab: int = VOCAB
) -> Path:
    """Save a random Llama, with llada-tiny's tokenizer.

    Args:
        folder: where to.
        seed: of its weights.
        layers: how many.
        sharpness: factor of the last layer: entropies then lie between 0 and 6 bits.
        vocab: size of the vocabulary.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=EOS,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight *= sharpness
    model.save_pretrained(folder)
    tokenizer = files("vllm_dlm") / "assets/llada-tiny"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(str(tokenizer / name), folder)
    return folder


def load(folder: Path) -> Any:
    """The network in `folder`, in float32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@dataclass
class Written:
    """What the reference wrote."""

    token_ids: list[int]
    models: str
    """Who wrote each token: s or l."""
    closest: float
    """Smallest distance, over all steps, of a decision from a tie: of the two best
    logits, or of the mean entropy from tau."""

    @property
    def switches(self) -> list[int]:
        pairs = zip(self.models, self.models[1:], strict=False)
        return [i + 1 for i, (one, next_) in enumerate(pairs) if one != next_]


@torch.no_grad()
def write(
    networks: dict[str, Any],
    prompt: list[int],
    max_tokens: int,
    tau: float,
    window: int = 5,
    min_tokens: int = 10,
    reserved: int = VOCAB - 1,
    ignore_eos: bool = True,
) -> Written:
    """Greedy decoding by two networks, "s" and "l"."""
    token_ids: list[int] = []
    models = ""
    active = "s"
    entropies: list[float] = []
    closest = math.inf
    while len(token_ids) < max_tokens:
        text = torch.tensor([prompt + token_ids])
        logits = networks[active](text).logits[0, -1].double()
        log_p = logits.log_softmax(-1)
        entropies.append(float(-(log_p.exp() * log_p).sum() / math.log(2)))
        if len(entropies) > min_tokens:
            mean = sum(entropies[-window:]) / window
            closest = min(closest, abs(mean - tau))
            if (active == "s" and mean >= tau) or (active == "l" and mean <= tau):
                active = "l" if active == "s" else "s"
                entropies = []
                continue
        logits[reserved] = -math.inf
        best = logits.topk(2).values
        closest = min(closest, float(best[0] - best[1]))
        token_ids.append(int(logits.argmax()))
        models += active
        if token_ids[-1] == EOS and not ignore_eos:
            break
    return Written(token_ids, models, closest)
