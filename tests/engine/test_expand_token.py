# SPDX-License-Identifier: Apache-2.0
"""DreamOn's token that asks for two masks is no text: it is never written.

Here it is the token that the random model writes most.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from byte_model import write_byte_model
from engine.cases import make_prompt
from engine.harness import Engine, params
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

SUFFIX = [5, 6, 7]
OPTIONS = [
    params(24, dlm={"strategy": "threshold", "suffix": SUFFIX}),
    params(24, dlm={"strategy": "static", "steps": 3, "suffix": SUFFIX}),
    params(24, dlm={"strategy": "credit", "block_length": 8}),
    params(24, dlm={"strategy": "klass"}, temperature=1.0, seed=4),
    params(24, dlm={"strategy": "threshold"}, ignore_eos=True, logprobs=2),
]
PROMPTS = [make_prompt(3 + number, number) for number in range(len(OPTIONS))]


def test_it_is_never_written(engine: Engine, engines: Callable[..., Engine]):
    before = Counter(
        token for one in engine.run(PROMPTS, OPTIONS) for token in one.tokens
    )
    special = {engine.llm.get_tokenizer().eos_token_id}
    expand = next(t for t, _ in before.most_common() if t not in special)
    assert before[expand] > 5
    without = engines(hf_overrides={"expand_token_id": expand})
    together = without.run(PROMPTS, OPTIONS)
    for prompt, option, one in zip(PROMPTS, OPTIONS, together, strict=True):
        assert one.tokens and expand not in one.tokens
        # What a request may say itself has the same effect.
        assert without.run([prompt], option) == [one]
    option = OPTIONS[0].clone()
    option._bad_words_token_ids = [[expand]]
    assert engine.run(PROMPTS[:1], option) == together[:1]


def test_a_text_that_must_match_does_without_it(
    engines: Callable[..., Engine], tmp_path: Path
):
    """Also where its bytes would match: no path leads through it."""
    folder = write_byte_model(tmp_path / "LLaDA-bytes")
    pattern = StructuredOutputsParams(regex="[ab]{6}")
    prompts = [[1 + number, 2, 3] for number in range(4)]
    asked = [
        params(8, dlm={"strategy": "threshold"}, structured_outputs=pattern, **more)
        for more in ({}, *({"temperature": 1.0, "seed": seed} for seed in range(3)))
    ]
    own = {"hf_overrides": {"expand_token_id": ord("a")}}
    for options, text in (({}, rb"[ab]{6}"), (own, rb"b{6}")):
        for one in engines(model=str(folder), **options).run(prompts, asked):
            assert re.fullmatch(text, bytes(one.tokens[:6]))
    asked[0].structured_outputs = StructuredOutputsParams(regex="a{6}")
    with pytest.raises(VLLMValidationError, match="cannot write any text"):
        engines(model=str(folder), **own).run(prompts[:1], asked[:1])
