# SPDX-License-Identifier: Apache-2.0
"""What ends the thought in front of what must match, by vLLM's own parsers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm.tokenizers
from byte_model import END_OF_THOUGHT, write_thinking_model
from transformers import AutoTokenizer
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from vllm_dlm.admission.handover import NotedOptions, take_notes
from vllm_dlm.admission.thoughts import note_thought
from vllm_dlm.constraints.thoughts import ThoughtEnd
from vllm_dlm.messages import OptionError


@pytest.fixture(autouse=True)
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = write_thinking_model(tmp_path / "LLaDA-thinks")
    found = AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr(
        vllm.tokenizers, "cached_tokenizer_from_config", lambda config: found
    )
    return found


def noted(
    prompt: Any, parser: str | None, constrained: bool = True, inside: bool = False
) -> ThoughtEnd | None:
    asked = StructuredOutputsParams(regex="a+") if constrained else None
    params = SamplingParams(structured_outputs=asked)
    take_notes(params)
    settings = SimpleNamespace(reasoning_parser=parser, enable_in_reasoning=inside)
    config: Any = SimpleNamespace(
        structured_outputs_config=settings, model_config=SimpleNamespace()
    )
    note_thought(params, prompt, config)
    assert isinstance(params.extra_args, NotedOptions)
    return params.extra_args.thought


def test_the_parsers_token_ends_the_thought(tokenizer: Any):
    open_, closed = (
        {"prompt_token_ids": tokenizer.encode(text)}
        for text in ("Ada", "Ada<think></think>")
    )
    assert noted(open_, "deepseek_r1") == (END_OF_THOUGHT, "</think>")
    assert noted(closed, "deepseek_r1") is None
    assert noted(open_, None) is None
    assert noted(open_, "deepseek_r1", constrained=False) is None
    assert noted(open_, "deepseek_r1", inside=True) is None


def test_what_cannot_be_known_is_refused(tokenizer: Any):
    with pytest.raises(OptionError, match="deepseek_r1 looks .* no tokens to look for"):
        noted("Ada", "deepseek_r1")
    # Its thoughts end with words, in more than one form.
    prompt = {"prompt_token_ids": tokenizer.encode("Ada")}
    with pytest.raises(OptionError, match="granite looks .* by which token"):
        noted(prompt, "granite")
