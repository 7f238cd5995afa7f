# SPDX-License-Identifier: Apache-2.0
"""Allowed tokens against llguidance, which masks a text that grows from the left.

llguidance is one of vLLM's own backends for autoregressive models. Both are asked what
may follow, on random walks through patterns over a vocabulary of bytes and words.
"""

from __future__ import annotations

import random

import llguidance
import llguidance.hf
import llguidance.numpy
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vllm_dlm.constraints.automaton import compile_pattern
from vllm_dlm.constraints.schema import schema_pattern
from vllm_dlm.constraints.vocabulary import Vocabulary, byte_letters

WORDS = ["ab", "abc", "ca", '"a', '": ', "},", "12", "00", "é", "née", " x", "-1", "🙂"]
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": -12, "maximum": 300},
        "né": {"type": "string", "maxLength": 3},
    },
    "required": ["a"],
}
PATTERNS = [
    r"(ab|c)+",
    r"a{2,5}b?",
    r"[^a-z]{1,3}x",
    r"(?:née|🙂|[à-ü])*!",
    r"-?(?:0|[1-9][0-9]{0,3})(?:\.[0-9]+)?",
    schema_pattern(SCHEMA),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    letters = byte_letters()
    spelling = {byte: letter for letter, byte in letters.items()}
    words = ["".join(spelling[byte] for byte in word.encode()) for word in WORDS]
    vocab = {**letters} | {word: 256 + i for i, word in enumerate(words)}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_same_tokens_may_follow(
    tokenizer: PreTrainedTokenizerFast, pattern: str
) -> None:
    size, end = len(tokenizer), tokenizer.eos_token_id
    vocabulary = Vocabulary.of_tokenizer(tokenizer, size)
    automaton = compile_pattern(pattern, vocabulary, [end])
    theirs = llguidance.hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=end)
    grammar = llguidance.LLMatcher.grammar_from_regex(pattern)
    choose = random.Random(7)
    mask = llguidance.numpy.allocate_token_bitmask(1, size)
    for _ in range(15):
        matcher = llguidance.LLMatcher(theirs, grammar)
        state = automaton.start
        for _ in range(30):
            llguidance.numpy.fill_next_token_bitmask(matcher, mask, 0)
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:size]
            taken = automaton.transitions[state, automaton.class_of]
            taken = np.where(automaton.class_of < 0, -1, taken)
            allowed, ours = np.flatnonzero(bits), np.flatnonzero(taken >= 0)
            if len(allowed) == 1:
                # What follows is certain: llguidance takes the tokenizer's own pieces.
                assert allowed[0] in ours
            else:
                assert allowed.tolist() == ours.tolist()
            token = int(choose.choice(allowed))
            if token == end:
                assert automaton.accepting[state]
                break
            state = taken[token]
            assert matcher.consume_token(token)
