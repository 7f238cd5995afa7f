# SPDX-License-Identifier: Apache-2.0
"""`vllm-dlm models MODEL --memory`: counted as vLLM will allocate it."""

import re
from pathlib import Path

import pytest
import recipes
from released_configs import RELEASED
from safetensors.torch import load_file

from vllm_dlm.cli import command as cli
from vllm_dlm.cli import memory
from vllm_dlm.config.aliases import ALIASES
from vllm_dlm.config.released_shapes import RELEASED as FROM_RELEASE
from vllm_dlm.config.released_shapes import released_config

ROOT = Path(__file__).parents[2]
ON_THE_HUB = [name for name, alias in ALIASES.items() if not alias.built_in]


def aliases_of(checkpoint: str) -> list[str]:
    return [n for n in ON_THE_HUB if ALIASES[n].target.endswith(f"/{checkpoint}")]


@pytest.mark.parametrize("checkpoint", RELEASED)
def test_sizes_are_those_of_the_released_config(checkpoint: str):
    released, _, _ = RELEASED[checkpoint]
    (name,) = aliases_of(checkpoint)
    fields, _ = released_config(name)
    other_names = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "mlp_hidden_size": "intermediate_size",
        "weight_tying": "tie_word_embeddings",
    }
    known = {other_names.get(field, field): value for field, value in released.items()}
    if checkpoint.startswith("SDAR-30B"):
        # The tests' config of it has SDAR-4B's widths.
        known = {
            n: v for n, v in known.items() if n.startswith(("num_exp", "moe", "arch"))
        }
    shared = fields.keys() & known.keys()
    assert {"architectures"} < shared
    assert {field: fields[field] for field in shared} == {
        field: known[field] for field in shared
    }


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_every_short_name_has_sizes(name: str):
    fields, source = released_config(name)
    assert fields["num_hidden_layers"] and source
    assert fields["model_type"] == ALIASES[name].family.model_type


def test_needs_are_those_of_the_files(capsys):
    assert cli.main(["models", "llada-tiny", "--memory", "--length", "256"]) == 0
    said = capsys.readouterr().out
    folder = Path(ALIASES["llada-tiny"].path)
    tensors = load_file(folder / "model.safetensors").values()
    num_weights = sum(tensor.numel() for tensor in tensors)
    # vLLM pads the vocabulary to whole tiles; the file does not.
    shown = int(re.search(r"([\d,]+) weights", said)[1].replace(",", ""))
    assert num_weights <= shown < 1.05 * num_weights
    assert f"{folder}/config.json" in said
    assert "per request of 256 tokens" in said


def test_a_model_that_is_not_here_is_built_from_its_sizes(capsys):
    assert cli.main(["models", "llada2-mini", "--memory"]) == 0
    said = capsys.readouterr().out
    assert "32.53 GB: 16,255,643,392 weights, bfloat16" in said
    assert "40,960 bytes per token, 0.17 GB per request of 4096 tokens" in said
    assert f"sizes     {FROM_RELEASE}" in said


def test_how_many_fit():
    """80 GB, of which 90 % are usable, and 16 GB of weights; 1 GB a request."""
    needs = memory.Needs(
        num_parameters=8 * 10**9,
        weights=16 * 10**9,
        kv_per_token=10**6,
        num_heads=32,
        num_kv_heads=4,
        dtype="bfloat16",
    )
    assert needs.num_requests(80, 1, 1000, 0.9) == 56
    assert needs.num_requests(80, 2, 1000, 0.9) == (72 - 8) * 2
    # Eight GPUs, and four heads: two GPUs hold the same keys.
    assert needs.num_requests(80, 8, 1000, 0.9) == (72 - 2) * 4
    assert needs.num_requests(16, 1, 1000, 0.9) == 0
    assert needs.num_requests(80, 3, 1000, 0.9) is None


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--memory"], "name a folder or a short name"),
        (["llada", "--length", "8"], "--length is for --memory"),
        (["nothing", "--memory"], "neither a folder"),
    ],
)
def test_refusals(argv: list[str], said: str, capsys):
    assert cli.main(["models", *argv]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("length", ["0", "-1", "many"])
def test_length_is_a_number(length: str, capsys):
    with pytest.raises(SystemExit):
        cli.main(["models", "llada", "--memory", "--length", length])
    assert "whole number" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", sorted(recipes.PAGES.glob("*.md")), ids=lambda p: p.stem
)
def test_recipes_say_what_the_command_says(page: Path):
    """Every released model at its full shape."""
    for row in recipes.rows(page):
        for name in row.names:
            needs, source = memory.measure_released(name)
            assert row.source == source
            assert row.weights == f"{needs.weights / 1e9:.2f} GB"
            assert row.kv_per_token == f"{needs.kv_per_token:,} bytes"
            counts = [
                needs.num_requests(gigabytes, gpus, 4096, memory.usable_share())
                for gigabytes, gpus in recipes.COLUMNS
            ]
            said = ["-" if count is None else str(count) for count in counts]
            assert list(row.fitting) == said, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("llada", "LLaDA 8B"),
        ("dream", "Dream 7B"),
        ("sdar-8b", "SDAR 8B"),
        ("llada-moe", "LLaDA-MoE 7B"),
        ("llada2-mini", "LLaDA2-mini 16B"),
        ("llada2-flash", "LLaDA2-flash 100B"),
    ],
)
def test_parameters_are_those_counted_from_published_shapes(name: str, title: str):
    """By the formula that docs/models.md gives, which another count follows."""
    text = (ROOT / "docs/models.md").read_text("utf-8")
    (count,) = re.findall(rf"^\| {title} \| ([\d,]+) \|", text, flags=re.M)
    needs, _ = memory.measure_released(name)
    assert needs.num_parameters == int(count.replace(",", ""))
