# SPDX-License-Identifier: Apache-2.0
"""ADED on a real model, where `python -m benchmarks.smollm2` has fetched it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from spec_decode.harness import Engine, params

# No part of the package: found beside it, for this import only.
sys.path.append(str(Path(__file__).parents[2]))
from benchmarks import smollm2  # noqa: E402

sys.path.pop()

QUESTIONS = [
    "A shop sells 12 apples a day for 7 days. How many apples does it sell?",
    "Tom has 3 boxes of 8 pens and gives 5 pens away. How many are left?",
    "List the numbers from 1 to 12 in words.",
]


@pytest.mark.slow
def test_greedy_text_of_a_real_model(engines: Callable[..., Engine]):
    """In float32: lower precision rounds one row and several differently."""
    model = smollm2.default_cache() / smollm2.NAME
    if not (model / "model.safetensors").is_file():
        pytest.skip("no SmolLM2: `python -m benchmarks.smollm2` fetches it")
    options = {"model": model, "skip_tokenizer_init": False, "max_model_len": 256}
    plain = engines(**options)
    tokenizer = plain.llm.get_tokenizer()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for question in QUESTIONS
    ]
    wanted = plain.run(prompts, params(64))
    engine = engines({"method": "aded"}, **options)
    assert engine.run(prompts, params(64)) == wanted
    assert not engine.drafter.failed
    assert engine.drafter.counts["rows"] < 0.9 * 3 * 63
