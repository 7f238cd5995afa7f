# SPDX-License-Identifier: Apache-2.0
"""Engines beside the one that is shared: plain, drafting, compiled, over two ranks."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from steering.conftest import Steered
from steering.reference import BASE, TUNED, load
from transformers import LlamaConfig, LlamaForCausalLM

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


def quantize(folder: Path) -> tuple[str, Any]:
    """The base with weights of 8 bits; and its network, with those weights."""
    network = load(BASE)
    state = network.state_dict()
    packed = {}
    for name, weight in state.items():
        if not name.endswith("_proj.weight"):
            packed[name] = weight.contiguous()
            continue
        scale = weight.abs().amax(1, keepdim=True) / 127
        packed[name] = (weight / scale).round().to(torch.int8)
        packed[f"{name}_scale"] = scale
        state[name] = packed[name] * scale
    network.load_state_dict(state)
    folder.mkdir()
    save_file(packed, folder / "model.safetensors")
    kind = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**kind, "strategy": "channel", "dynamic": False},
        "input_activations": {**kind, "strategy": "token", "dynamic": True},
    }
    config = json.loads(Path(f"{local_folder(BASE)}/config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{local_folder(BASE)}/{name}", folder)
    return str(folder), network


def test_a_quantized_base(engines, pair, prompts, tmp_path):
    """Beside a tuned model that is not; what it leaves as it is has another prefix."""
    folder, network = quantize(tmp_path / "base")
    engine = engines(dlm_steer_base=folder, dlm_steer_mu=-1.0)
    core = engine.llm.llm_engine.engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.model
    assert model.base.model.layers[0].mlp.down_proj.weight.dtype == torch.int8
    assert model.base.lm_head.weight.dtype == torch.float32
    assert model.tuned.model.layers[0].mlp.down_proj.weight.dtype == torch.float32
    other = copy.copy(pair)
    other.networks = [pair.networks[0], network]
    sure = 0
    for prompt, tokens in zip(prompts, engine.write(prompts), strict=True):
        wanted = other.write(prompt, 24, -1.0, 0.1)
        # Activations are rounded to 8 bits, too.
        if wanted.closest > 0.2:
            sure += 1
            assert tokens == wanted.token_ids
    assert sure > 5


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
