# SPDX-License-Identifier: Apache-2.0
"""Structured output offline: sampling parameters of vLLM's own, on a real engine."""

from __future__ import annotations

import re

import pytest
from engine.harness import Engine, params
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from vllm_dlm.model_executor import patterns

EOS = 121


def words(tokens: list[int]) -> str:
    kept = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
    return "".join(f"t{token}" for token in kept)


def test_constraints_of_sampling_params(engine: Engine):
    """They hold, for each of several choices; the caller's object stays as it was."""
    regex = r"t1(t[2-4]|t5\d){3,9}"
    asked = StructuredOutputsParams(regex=regex)
    several = params(24, structured_outputs=asked, n=3, temperature=1.0, seed=5)
    either = params(
        24, structured_outputs=StructuredOutputsParams(choice=["t7t8", "t9"])
    )
    rules = 'root ::= pair root | "t8"\npair ::= "t7" | "t1" "t2"'
    ruled = params(24, structured_outputs=StructuredOutputsParams(grammar=rules))
    first, second, third = engine.outputs(
        [[1, 2, 3], [4, 5], [6]], [several, either, ruled]
    )
    text = words(list(third.outputs[0].token_ids))
    assert re.fullmatch("(t7|t1t2)*t8", text)
    texts = [words(list(choice.token_ids)) for choice in first.outputs]
    assert len(texts) == 3
    assert all(re.fullmatch(regex, text) for text in texts)
    assert words(list(second.outputs[0].token_ids)) in ("t7t8", "t9")
    assert several.structured_outputs is asked and asked.regex == regex
    assert several.extra_args is None


def test_the_engine_reads_what_admission_has_compiled(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    """No step of others waits for a pattern to be compiled."""

    def compiles(*args: object) -> None:
        raise AssertionError("the engine compiles a pattern itself")

    monkeypatch.setattr(patterns, "compile_answer", compiles)
    regex = r"t8(t[2-4]|t6\d){3,9}"
    asked = params(24, structured_outputs=StructuredOutputsParams(regex=regex))
    (result,) = engine.outputs([[1, 2, 3]], [asked])
    assert re.fullmatch(regex, words(list(result.outputs[0].token_ids)))


def test_allowed_tokens_and_lengths(engine: Engine):
    asked = StructuredOutputsParams(regex=r"(t\d)+")
    some = params(
        12, structured_outputs=asked, allowed_token_ids=[1, 2, EOS], min_tokens=5
    )
    (result,) = engine.outputs([[1, 2, 3]], [some])
    tokens = list(result.outputs[0].token_ids)
    written = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
    assert len(written) >= 5 and set(written) <= {1, 2}
    barred = params(12, structured_outputs=asked, allowed_token_ids=[50, EOS])
    with pytest.raises(VLLMValidationError, match="cannot write any text"):
        engine.outputs([[1]], [barred])
    short = params(3, structured_outputs=StructuredOutputsParams(regex=r"(t\d){4}"))
    with pytest.raises(VLLMValidationError, match="to at least 4"):
        engine.outputs([[1]], [short])
