# SPDX-License-Identifier: Apache-2.0
"""Engines beside the one that is shared: plain, drafting, compiled, over two ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from steering.conftest import Steered
from steering.reference import BASE, TUNED
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import envs

from vllm_dlm.config.aliases import local_folder

pytestmark = pytest.mark.slow


def values(results: list[Any]) -> list[Any]:
    """Tokens and the bits of their log-probabilities."""
    return [
        [
            (token, {each: value.logprob for each, value in found.items()})
            for token, found in zip(output.token_ids, output.logprobs, strict=True)
        ]
        for output in (result.outputs[0] for result in results)
    ]


def test_without_mu_and_keep_it_is_the_tuned_model(engines, steered, prompts):
    """Bit for bit, drawn and greedy."""
    plain = engines()
    steered.set(0.0, 0.0)
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        wanted = values(plain.run(prompts, logprobs=3, **options))
        assert values(steered.run(prompts, logprobs=3, **options)) == wanted


def test_vllms_own_drafts(engines, steered, prompts):
    wanted = steered.write(prompts)
    given = {"dlm_steer_base": BASE, "dlm_steer_mu": -1.2}
    for speculative in (
        {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
        {"method": "draft_model", "model": str(local_folder(BASE))}
        | {"num_speculative_tokens": 3},
    ):
        drafting = engines(**given, speculative_config=speculative)
        assert drafting.write(prompts) == wanted


def test_compiled(engines, steered, prompts):
    wanted = steered.write(prompts)
    given = {"dlm_steer_base": BASE, "dlm_steer_mu": -1.2}
    compiled = engines(**given, enforce_eager=False)
    assert compiled.write(prompts) == wanted


def write_llama(folder: Path, seed: int, layers: int) -> str:
    """A random Llama of an odd vocabulary, whose halves are not of one size."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{local_folder(TUNED)}/{name}", folder)
    return str(folder)


def test_two_ranks_write_what_one_writes(tmp_path, prompts, monkeypatch):
    """Both heads' vocabularies are gathered."""
    # vLLM has kept what the variables were when this process' last engine started.
    envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    tuned = write_llama(tmp_path / "tuned", 1, 2)
    base = write_llama(tmp_path / "base", 2, 1)
    texts = []
    for degree in (1, 2):
        engine = Steered(
            tuned,
            dlm_steer_base=base,
            dlm_steer_mu=-1.0,
            tensor_parallel_size=degree,
            distributed_executor_backend="mp",
        )
        texts.append(engine.write(prompts))
        engine.llm.llm_engine.engine_core.shutdown()
    assert texts[0] == texts[1]
