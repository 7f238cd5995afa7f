# SPDX-License-Identifier: Apache-2.0
"""Training of models that do without some layers: what is trained, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from vllm_dlm.cli.command import main  # noqa: E402
from vllm_dlm.training import layer_skip  # noqa: E402
from vllm_dlm.training.causal_options import CausalOptions  # noqa: E402
from vllm_dlm.training.drafters.teacher import load_causal_lm  # noqa: E402
from vllm_dlm.training.loop import LoopOptions  # noqa: E402

PROMPT = [1, 20, 21, 22]


def what(model: str = "llama-tiny") -> CausalOptions:
    return CausalOptions(model=model, num_prompts=8, max_tokens=8, batch_rows=4)


def test_a_network_without_layers_is_itself_again():
    network = load_causal_lm("llama-tiny")
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        whole = network(ids, use_cache=False).logits
        with layer_skip.skipping(network, [0, 2, 4, 7]):
            some = network(ids, use_cache=False).logits
            assert len(network.state_dict()) < 75 * 0.6
        kept = network.model.layers
        network.model.layers = torch.nn.ModuleList(kept[i] for i in (0, 2, 4, 7))
        network.config.num_hidden_layers = 4
        torch.testing.assert_close(network(ids, use_cache=False).logits, some)
        network.model.layers, network.config.num_hidden_layers = kept, 8
        again = network(ids, use_cache=False).logits
        torch.testing.assert_close(again, whole, rtol=0, atol=0)


def test_a_prompt_that_all_layers_read():
    """Against a loop that computes everything anew, keys of the prompt as they were."""
    network = load_causal_lm("llama-tiny")
    every = layer_skip.answer_behind_whole_prompt(network, [*range(8)], PROMPT, 6)
    some = layer_skip.answer_behind_whole_prompt(network, [0, 2, 4, 7], PROMPT, 6)
    tokens = list(PROMPT)
    with torch.inference_mode():
        for _ in range(6):
            logits = network(torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    assert every == tokens[4 : 4 + len(every)]
    # The first token is of all layers.
    assert some[0] == every[0] and some != every


def test_a_model_learns_and_goes_on(tmp_path: Path, capsys: Any):
    from safetensors.torch import load_file

    from vllm_dlm.config.aliases import resolve

    options = LoopOptions(steps=2, eval_steps=2)
    assert layer_skip.train(tmp_path, options, what(), speedup=2)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["layer_skip"] == {"reserved": [0, 2, 4, 7]}
    assert said["architectures"] == ["LayerSkipLlamaForCausalLM"]
    old = load_file(f"{resolve('llama-tiny')}/model.safetensors")
    new = load_file(tmp_path / "model.safetensors")
    assert old.keys() == new.keys()
    same = {name for name in old if torch.equal(old[name], new[name])}
    # Embeddings are frozen, and what is not computed is not changed.
    assert same == {"model.embed_tokens.weight"} | {
        name for name in old if ".layers." in name and name.split(".")[2] in "1356"
    }
    command = ["train", "layer-skip", "llama-tiny", "--output-dir", str(tmp_path)]
    sizes = ["--num-prompts", "8", "--max-tokens", "8", "--num-problems", "2"]
    assert main([*command, *sizes, "--steps", "2", "--skip-training"]) == 0
    shown = capsys.readouterr().out
    assert "| all layers, before | 8 | 100.0 % |" in shown
    assert "| skipping, after | 4 |" in shown


def test_refusals(tmp_path: Path):
    options = LoopOptions(steps=1)
    with pytest.raises(ValueError, match="from 1 to 4 with 8 layers"):
        layer_skip.train(tmp_path, options, what(), speedup=5)
    with pytest.raises(ValueError, match="not an autoregressive model"):
        layer_skip.train(tmp_path, options, what("llada-tiny"))
