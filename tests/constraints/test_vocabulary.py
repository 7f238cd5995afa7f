# SPDX-License-Identifier: Apache-2.0
"""Tokens as bytes: byte-level BPE, byte fallback and SentencePiece's blanks."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from vllm_dlm.constraints.limits import ConstraintError
from vllm_dlm.constraints.vocabulary import Vocabulary, byte_letters


def spelled(vocabulary: Vocabulary) -> dict[int, bytes]:
    """Id -> bytes."""
    data, cuts = vocabulary.data.tobytes(), vocabulary.offsets.tolist()
    texts = [data[one:other] for one, other in zip(cuts, cuts[1:], strict=False)]
    return dict(zip(vocabulary.ids.tolist(), texts, strict=True))


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_byte_level() -> None:
    """The letters are those that the tokenizers' own alphabet has, byte by byte."""
    assert set(byte_letters()) == set(ByteLevel.alphabet())
    tokens = {"Ġthe": 0, "Ã©": 1, "Ċ": 2, "a": 3, "<tool_call>": 4, "<|end|>": 5}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    tokenizer.add_special_tokens([AddedToken("<|end|>")])
    vocabulary = Vocabulary.of_tokenizer(fast(tokenizer), 8)
    expected = {0: b" the", 1: "é".encode(), 2: b"\n", 3: b"a", 4: b"<tool_call>"}
    # A special token is no text; ids 6 and 7 have logits and no token.
    assert spelled(vocabulary) == expected
    assert vocabulary.size == 8
    for token, text in expected.items():
        assert tokenizer.decode([token]).encode() == text


def test_byte_fallback_and_blanks() -> None:
    tokens = {"<unk>": 0, "<0x0A>": 1, "<0xE3>": 2, "▁the": 3, "▁": 4, "é": 5}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<unk>"])
    vocabulary = Vocabulary.of_tokenizer(fast(tokenizer), 6)
    assert spelled(vocabulary) == {
        **{1: b"\n", 2: b"\xe3", 3: b" the", 4: b" ", 5: "é".encode()}
    }


def test_ids_without_logits_are_left_out() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    vocabulary = Vocabulary.of_tokenizer(fast(tokenizer), 2)
    assert spelled(vocabulary) == {0: b"a", 1: b"b"}


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        all_special_ids: list[int] = []

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(ConstraintError, match="needs a fast tokenizer"):
        Vocabulary.of_tokenizer(Slow(), 1)


def test_neighbours_know_what_they_share() -> None:
    vocabulary = Vocabulary.of_tokens([b"ab", b"abc", b"b", b"a", b"abd", b""])
    assert vocabulary.shared.tolist() == [0, 1, 2, 2, 0]
    assert vocabulary.ids.tolist() == [3, 0, 1, 4, 2]
    same = Vocabulary.of_tokens({0: b"ab", 1: b"abc", 2: b"b", 3: b"a", 4: b"abd"}, 6)
    other = Vocabulary.of_tokens([b"ab", b"abc", b"b", b"a", b"abe", b""])
    assert same.key == vocabulary.key != other.key
