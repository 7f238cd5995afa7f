# SPDX-License-Identifier: Apache-2.0
"""Training of models that draft for themselves behind pads: rows, weights, command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from vllm_dlm.cli.command import main  # noqa: E402
from vllm_dlm.tasks import tokenizer  # noqa: E402
from vllm_dlm.training.causal import Rows  # noqa: E402
from vllm_dlm.training.causal_options import CausalOptions  # noqa: E402
from vllm_dlm.training.drafters import lud  # noqa: E402
from vllm_dlm.training.drafters.lud_rows import (  # noqa: E402
    unit_weights,
    with_pads,
)
from vllm_dlm.training.loop import LoopOptions  # noqa: E402

PAD = 9
STARTS, ENDS, WIDTH = [2, 4, 3], [6, 9, 4], 9


@pytest.fixture(scope="module")
def rows() -> Rows:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (3, WIDTH), generator=generator)
    ends = torch.tensor(ENDS)
    valid = torch.arange(WIDTH) < ends[:, None]
    return Rows(ids * valid, torch.tensor(STARTS), ends)


def test_pads_see_what_they_will_see_when_served(rows: Rows):
    """Each group is computed as if it alone stood behind its part of the text."""
    torch.manual_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.3,
        )
    ).eval()
    padded = with_pads(rows, PAD, groups=4, tokens=3, seed="x")
    with torch.inference_mode():
        logits = network(
            padded.ids, attention_mask=padded.mask, position_ids=padded.positions
        ).logits
        text = network(rows.ids).logits
        torch.testing.assert_close(logits[:, :WIDTH], text)
        pads = padded.of_pads(logits)
        cuts = padded.targets[..., 0] - 1
        for row in range(3):
            for group in range(4):
                cut = int(cuts[row, group])
                assert STARTS[row] <= cut <= max(STARTS[row], ENDS[row] - 2)
                served = torch.cat((rows.ids[row, :cut], torch.tensor([PAD] * 3)))
                alone = network(served[None]).logits[0, cut:]
                torch.testing.assert_close(pads[row, group], alone)
    assert len(cuts[1].unique()) > 1
    assert rows.predicts.sum(1).tolist() == [4, 5, 1]
    assert rows.predicts[2].nonzero().tolist() == [[2]]


def test_which_pads_are_taught():
    confidences = torch.tensor([[0.0, 0.9, 0.4, 0.95, 0.92, 0.5]])
    targets = torch.tensor([[[1, 2, 3], [3, 4, 5], [4, 5, 6], [1, 2, 3]]])
    ends = torch.tensor([6])

    def taught(alpha: float) -> list[list[float]]:
        return unit_weights(confidences, targets, ends, alpha)[0].tolist()

    assert taught(0.9) == [[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]]
    # Nothing stands behind the text.
    assert taught(0.0) == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]]


def options(steps: int) -> LoopOptions:
    return LoopOptions(steps=steps, eval_steps=steps)


def what(**given: Any) -> CausalOptions:
    given = {"num_prompts": 8, "max_tokens": 8, "batch_rows": 4} | given
    return CausalOptions(**{"model": "llama-tiny"} | given)


def test_a_model_learns_and_goes_on(tmp_path: Path, capsys: Any):
    from safetensors.torch import load_file

    from vllm_dlm.config.aliases import resolve

    assert lud.train(tmp_path, options(2), what(), tokens=3, groups=2)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["lud"] == {"pad_token_id": tokenizer.MASK_ID, "tokens": 3}
    assert said["architectures"] == ["LlamaForCausalLM"]
    old = load_file(f"{resolve('llama-tiny')}/model.safetensors")
    new = load_file(tmp_path / "model.safetensors")
    assert old.keys() == new.keys()
    assert any(not torch.equal(old[name], new[name]) for name in old)
    answers = (tmp_path / "answers.json").read_text()
    command = ["train", "lud", "llama-tiny", "--output-dir", str(tmp_path)]
    sizes = ["--num-prompts", "8", "--max-tokens", "8", "--num-problems", "2"]
    assert main([*command, *sizes, "--steps", "2"]) == 0
    shown = capsys.readouterr().out
    assert "| tokens per verifying forward |" in shown
    assert "| 2 held-out problems right, without drafts |" in shown
    assert (tmp_path / "README.md").read_text().strip() in shown
    assert (tmp_path / "answers.json").read_text() == answers


@pytest.mark.parametrize(
    ("given", "arguments", "message"),
    [
        ({"model": "llada-tiny"}, {}, "is not an autoregressive model"),
        ({"batch_rows": 0}, {}, "batch_rows must be at least 1"),
        ({"scale": 0.0}, {}, "learning_rate_scale must be above 0"),
        ({"num_prompts": 1}, {}, "at least 2 prompts"),
        ({}, {"tokens": 0}, "tokens must be from 1 to 127, not 0"),
        ({}, {"groups": 65}, "groups must be from 1 to 64"),
        ({}, {"alpha": 1.5}, "alpha must be from 0 to 1"),
        ({}, {"pad_token": "<none>"}, "has no token '<none>'"),
    ],
)
def test_refusals(tmp_path: Path, given: Any, arguments: Any, message: str):
    with pytest.raises(ValueError, match=message):
        lud.train(tmp_path, options(1), what(**given), **arguments)


def test_a_pad_token_of_its_own(tmp_path: Path):
    assert lud.pad_token_id("llama-tiny", None) == tokenizer.MASK_ID
    assert lud.pad_token_id("llama-tiny", "<unk>") == tokenizer.TOKEN_IDS["<unk>"]
    tokenizer.save_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    said = json.loads(file.read_text())
    del said["mask_token"]
    file.write_text(json.dumps(said))
    # Its padding token ends a text.
    with pytest.raises(ValueError, match="with --pad-token"):
        lud.pad_token_id(str(tmp_path), None)
