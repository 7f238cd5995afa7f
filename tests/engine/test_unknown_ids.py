# SPDX-License-Identifier: Apache-2.0
"""Ids that the model has no token for, from every config there is, hurt nobody.

The checkpoint's vocabulary is 128; its tokenizer knows words beyond, one of them as the
end of a text, its generation_config.json and an override name ids beyond as well.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine.cases import make_prompt
from engine.harness import Engine, params
from tiers import fast
from vllm.exceptions import VLLMValidationError

PROMPTS = [make_prompt(3 + 5 * number, number) for number in range(8)]
BEYOND = {"far": 128, "end": 200}


@pytest.fixture(scope="module")
def careless(
    engines: Callable[..., Engine], checkpoint: Path, tmp_path_factory: Any
) -> Engine:
    folder = tmp_path_factory.mktemp("careless") / "llada"
    shutil.copytree(checkpoint, folder)

    def change(name: str, update: Callable[[dict[str, Any]], None]) -> None:
        content = json.loads((folder / name).read_text())
        update(content)
        (folder / name).write_text(json.dumps(content))

    change("tokenizer.json", lambda told: told["model"]["vocab"].update(BEYOND))
    change("tokenizer_config.json", lambda told: told.update(eos_token="end"))
    ends = {"eos_token_id": [121, 200, 4096, 126081]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return engines(
        model=str(folder), hf_overrides={"dlm_stop_ids": [11, 128, 126348, 2**31 - 1]}
    )


ASKED: list[dict[str, Any]] = [
    {"min_tokens": 1},
    {"min_tokens": 24, "temperature": 0.8, "seed": 1},
    {"min_tokens": 3, "ignore_eos": True, "stop_token_ids": [7]},
    {"min_tokens": 1, "allowed_token_ids": [0, 11, 121, 127]},
    {"min_tokens": 1, "logit_bias": {127: 3.0, 0: 3.0}},
    {"min_tokens": 1, "dlm": {"eotp": "token", "eotp_threshold": 0.1}},
    {"min_tokens": 2, "logprobs": 20},
]


@pytest.mark.parametrize("options", fast(*ASKED[1::2], of=ASKED), ids=str)
def test_texts_are_those_of_the_ids_that_exist(
    careless: Engine, busy_engine: Engine, options: dict[str, Any]
):
    """`busy_engine` has the stop id 11 alone besides its end of text."""
    dlm = {"block_length": 8} | options.get("dlm", {})
    sampling = params(24, **options | {"dlm": dlm})
    wanted = [one.tokens for one in busy_engine.run(PROMPTS, sampling)]
    assert [one.tokens for one in careless.run(PROMPTS, sampling)] == wanted


def test_bad_words_that_the_model_cannot_write(careless: Engine):
    dlm = {"block_length": 8}
    free = careless.run(PROMPTS, params(24, dlm=dlm, ignore_eos=True))
    for words in (["far"], ["t3 far", "end t3", "far far"]):
        sampling = params(24, dlm=dlm, ignore_eos=True, bad_words=words)
        assert careless.run(PROMPTS, sampling) == free
    words = ["far t3", "t11"]
    sampling = params(24, dlm=dlm, ignore_eos=True, bad_words=words)
    assert all(11 not in one.tokens for one in careless.run(PROMPTS, sampling))


def test_prompts_that_the_model_cannot_read(careless: Engine):
    llm = careless.llm
    for prompt in ("t3 far", {"prompt_token_ids": [3, 200]}):
        with pytest.raises(VLLMValidationError, match="no token of this model"):
            llm.generate(prompt, params(8), use_tqdm=False)
    with pytest.raises(VLLMValidationError, match="out of vocabulary"):
        llm.generate({"prompt_token_ids": [3, 201]}, params(8), use_tqdm=False)


@pytest.mark.slow
def test_large_numbers(careless: Engine):
    """`max_tokens` is cut by the context offline, and `min_tokens` with it."""
    sampling = params(2**30, min_tokens=2**30, top_k=2**62, temperature=0.5, seed=3)
    (result,) = careless.run(PROMPTS[:1], sampling)
    assert len(PROMPTS[0]) + len(result.tokens) == 256
