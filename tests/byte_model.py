# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights whose tokens are the 256 bytes: they spell JSON."""

from __future__ import annotations

import json
from pathlib import Path

from reference import diffusion_gemma
from reference.llada import write_random_checkpoint, write_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from vllm_dlm.constraints.vocabulary import byte_letters

MASK, EOS = 257, 258
SPECIAL = {"<|mdm_mask|>": MASK, "<|endoftext|>": EOS, "<|startoftext|>": 259}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}assistant: "
)

END_OF_THOUGHT = 256
THINKING_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    "{% if thinking is defined and not thinking %}<think></think>{% endif %}"
)


def write_byte_model(folder: Path, **changes: int) -> Path:
    """Write the checkpoint and its tokenizer; token i below 256 is byte i."""
    write_random_checkpoint(
        folder,
        seed=3,
        vocab_size=260,
        mask_token_id=MASK,
        eos_token_id=EOS,
        max_sequence_length=2048,
        **changes,
    )
    write_byte_tokenizer(folder)
    return folder


def write_byte_gemma(folder: Path, canvas_length: int) -> Path:
    """Write a DiffusionGemma and its tokenizer; byte 1 ends its texts, as `EOS` does.

    Its texts change with the prompt and with what its positions are fed.
    """
    diffusion_gemma.write_random_checkpoint(
        folder, seed=0, canvas_length=canvas_length, gain=0.3, vocab_size=260
    )
    write_tokenizer(
        folder, vocab_size=260, mask_token_id=MASK, eos_token_id=EOS, max_length=256
    )
    write_byte_tokenizer(folder)
    return folder


def write_byte_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, and a chat template into tokenizer_config.json."""
    vocab = dict(byte_letters())
    tokenizer = Tokenizer(BPE(vocab={**vocab, "unused": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False) for name in SPECIAL]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def write_thinking_model(folder: Path) -> Path:
    """Bytes for tokens, and two tokens round a thought."""
    write_byte_model(folder)
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    vocabulary = described["model"]["vocab"]
    assert vocabulary.pop("unused") == END_OF_THOUGHT
    (start,) = (one for one in described["added_tokens"] if one["id"] == 259)
    start |= {"content": "<think>", "special": False}
    described["added_tokens"].insert(
        0, start | {"id": END_OF_THOUGHT, "content": "</think>"}
    )
    vocabulary |= {"</think>": END_OF_THOUGHT}
    path.write_text(json.dumps(described))
    config = folder / "tokenizer_config.json"
    config.write_text(
        json.dumps(
            json.loads(config.read_text()) | {"chat_template": THINKING_TEMPLATE}
        )
    )
    return folder
