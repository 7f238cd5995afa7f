# SPDX-License-Identifier: Apache-2.0
"""A model without some of its layers writes what a plain loop over the others does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.harness import end
from spec_decode.harness import Engine, params, ragged_prompts
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from vllm_dlm.layer_skip.schedule import ARCHITECTURES

NUM_LAYERS = 5
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": 2,
}
SKIP = {"reserved": [0, 2, 4]}


def write(folder: Path, kind: type[PretrainedConfig], **options: Any) -> Path:
    """A random model whose config.json says that it is served without some layers."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(kind(**SIZES, **options))
    network.save_pretrained(folder)
    file = folder / "config.json"
    said = json.loads(file.read_text())
    said["architectures"] = [ARCHITECTURES[said["architectures"][0]]]
    said["layer_skip"] = SKIP
    file.write_text(json.dumps(said))
    return folder


def kept_layers(folder: Path) -> Any:
    """The network of a folder, with only the layers that are kept."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = network.model.layers
    network.model.layers = torch.nn.ModuleList(layers[i] for i in SKIP["reserved"])
    network.config.num_hidden_layers = len(network.model.layers)
    return network


def loop(network: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens, everything computed anew for each."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            logits = network(torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(LlamaConfig, {}, id="llama"),
        pytest.param(
            Qwen2Config,
            {"tie_word_embeddings": True},
            id="qwen2",
            marks=pytest.mark.slow,
        ),
        pytest.param(Qwen3Config, {"head_dim": 32}, id="qwen3", marks=pytest.mark.slow),
    ],
)
def test_texts_are_those_of_a_plain_loop(kind: Any, options: Any, tmp_path: Path):
    """In chunks, in a batch, and with prompts from the prefix cache."""
    folder = write(tmp_path, kind, **options)
    engine = Engine(folder, None, max_num_batched_tokens=32)
    prompts = ragged_prompts(5)
    network = kept_layers(folder)
    wanted = [loop(network, prompt, 12) for prompt in prompts]
    assert engine.run(prompts, params(12)) == wanted
    assert engine.run(prompts[2:3], params(12)) == wanted[2:3]
    # Layers that are left out have no weights and no pages.
    model = engine.runner.model
    assert [len(list(layer.parameters())) > 0 for layer in model.model.layers] == [
        index in SKIP["reserved"] for index in range(NUM_LAYERS)
    ]
    [group] = engine.runner.kv_cache_config.kv_cache_groups
    numbers = {int(name.split(".")[2]) for name in group.layer_names}
    assert numbers == {*SKIP["reserved"]}
    end({"": engine})


def test_a_schedule_from_the_command_line(tmp_path: Path):
    """--hf-overrides, over a folder that says nothing; the schedule is checked."""
    folder = write(tmp_path, LlamaConfig)
    file = folder / "config.json"
    said = json.loads(file.read_text())
    del said["layer_skip"]
    file.write_text(json.dumps(said))
    with pytest.raises(ValueError, match="of the layers 0 to 4"):
        Engine(folder, None, hf_overrides={"layer_skip": {"reserved": [0, 5]}})
