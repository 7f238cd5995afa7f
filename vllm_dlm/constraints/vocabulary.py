# SPDX-License-Identifier: Apache-2.0
"""A tokenizer's vocabulary as bytes, sorted so that neighbours share beginnings.

A token of a byte-level tokenizer stands for bytes in disguise (`Ġ` is a blank), one of
SentencePiece for text with `▁` for blanks, or for a single byte (`<0xE3>`). Special
tokens, which a decoder leaves out, have no bytes here: no pattern takes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_dlm.constraints import loops
from vllm_dlm.constraints.limits import ConstraintError

BLANK = "\u2581"
"""SentencePiece's letter for a blank."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens that have bytes, in the order of these. Compared as an object.

    Shapes: T tokens with bytes.
    """

    size: int
    """Ids of the model: those from 0 on, with bytes or without."""
    ids: NDArray[np.int64]
    """[T]"""
    data: NDArray[np.uint8]
    """The tokens' bytes, one token behind another."""
    offsets: NDArray[np.int64]
    """[T + 1], where each token's bytes begin."""
    shared: NDArray[np.int32]
    """[T], how many first bytes a token has in common with the one before."""
    key: str
    """The same for equal vocabularies only."""

    @classmethod
    def of_tokens(
        cls, tokens: Mapping[int, bytes] | Sequence[bytes], size: int | None = None
    ) -> Vocabulary:
        """Sort a vocabulary.

        Args:
            tokens: id -> bytes; none, or `b""`, for a token that is no text.
            size: ids of the model, if it has more than `tokens` says.
        """
        pairs = tokens.items() if isinstance(tokens, Mapping) else enumerate(tokens)
        ordered = sorted((text, token) for token, text in pairs if text)
        texts = [text for text, _ in ordered]
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(text) for text in texts], out=offsets[1:])
        data = np.frombuffer(b"".join(texts), np.uint8)
        ids = np.array([token for _, token in ordered], np.int64)
        least = int(ids.max()) + 1 if len(ids) else 0
        if not isinstance(tokens, Mapping):
            least = len(tokens)
        shared = loops.in_common(data, offsets)
        digest = hashlib.sha256(data.tobytes())
        digest.update(offsets.tobytes() + ids.tobytes())
        size = max(size or 0, least)
        digest.update(str(size).encode())
        for array in (ids, offsets, shared):
            array.flags.writeable = False
        return cls(size, ids, data, offsets, shared, digest.hexdigest())

    @classmethod
    def of_tokenizer(cls, tokenizer: Any, size: int) -> Vocabulary:
        """The vocabulary of a tokenizer of transformers.

        Args:
            tokenizer: as vLLM has it.
            size: ids that the model has logits for; others are left out.

        Raises:
            ConstraintError: the tokenizer does not say how its tokens are written.
        """
        special = set(tokenizer.all_special_ids)
        special |= {
            token
            for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items()
            if added.special
        }
        added = set(getattr(tokenizer, "added_tokens_decoder", {}))
        tokens = tokenizer.get_vocab()
        spelling = _spelling_of(tokenizer)
        texts = {}
        for text, token in tokens.items():
            if token in special or not 0 <= token < size:
                continue
            # An added token is written as it reads, whatever the others are.
            texts[token] = text.encode() if token in added else spelling(text)
        return cls.of_tokens(texts, size)


@cache
def byte_letters() -> Mapping[str, int]:
    """The letter that stands for each byte in byte-level BPE -> the byte.

    A byte that prints is its own letter in Latin-1; the others take the letters from
    U+0100 on, in order.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = {chr(byte): byte for byte in printed}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


def _spelling_of(tokenizer: Any) -> Any:
    """How a tokenizer writes a token: a function from its text to its bytes."""
    import json

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConstraintError(
            "structured output needs a fast tokenizer (tokenizer.json), and "
            f"{type(tokenizer).__name__} is none"
        )
    described = json.loads(backend.to_str())
    kinds = _decoders(described.get("decoder"))
    if not kinds and (described.get("model") or {}).get("byte_fallback"):
        kinds = {"ByteFallback"}
    if "ByteLevel" in kinds:
        letters = byte_letters()

        def byte_level(text: str) -> bytes:
            try:
                return bytes(letters[letter] for letter in text)
            except KeyError:
                return text.encode()

        return byte_level

    falls_back = "ByteFallback" in kinds

    def pieces(text: str) -> bytes:
        if falls_back and len(text) == 6 and text.startswith("<0x"):
            return bytes([int(text[3:5], 16)])
        return text.replace(BLANK, " ").encode()

    return pieces if kinds & {"ByteFallback", "Metaspace", "Replace"} else str.encode


def _decoders(described: Any) -> set[str]:
    """The kinds of a tokenizer's decoder, which may be several in a row."""
    if not described:
        return set()
    inside = described.get("decoders", ())
    return {described["type"]}.union(*map(_decoders, inside))
