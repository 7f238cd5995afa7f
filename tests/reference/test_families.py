# SPDX-License-Identifier: Apache-2.0
"""The families' reference network against transformers', and their tiny checkpoints.

Transformers has none of these families. It has what they are made of: Qwen2, Qwen3,
Qwen3-MoE and Llama under the same tensor names; Ministral-3, which is Nemotron's, and
GLM-4-MoE, whose attention (normed heads, half of them rotated) and router (sigmoid,
groups, bias, scale) are LLaDA2's, under other names. A 4-D attention mask makes them
bidirectional or block-causal.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from reference.checkpoints import write_checkpoint
from reference.families import FAMILIES
from reference.network import TinyModel, block_causal, causal_context
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PROMPT = [5, 17, 93, 2, 41, 60, 11]
LENGTH = 43

COUNTERPARTS = {
    "llada_moe": ("Qwen3Moe", {"norm_topk_prob": False, "moe_intermediate_size": 64}),
    "llada2": (
        "Glm4Moe",
        {"use_qk_norm": True, "n_routed_experts": 16, "n_shared_experts": 1},
    ),
    "llada2_2": (
        "Glm4Moe",
        {
            "use_qk_norm": True,
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "sdar": ("Qwen3", {}),
    "sdar_moe": ("Qwen3Moe", {}),
    "dream": ("Qwen2", {}),
    "fast_dllm_v2": ("Qwen2", {}),
    "a2d_qwen3": ("Qwen3", {}),
    "a2d_qwen2": ("Qwen2", {}),
    "a2d_llama": ("Llama", {}),
    "nemotron": ("Ministral3", {}),
    "rnd1": ("Qwen3Moe", {"rope_scaling": None, "sliding_window": None}),
    "dream_reasoner": ("Qwen3", {}),
    "stable_diffcoder": ("Llama", {}),
}
"""Family -> transformers' model, and what its config says otherwise."""

OTHER_YARN = {
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "factor": 4.0,
    "llama_4_scaling_beta": 0.3,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "original_max_position_embeddings": 16,
    "rope_theta": 100.0,
    "rope_type": "yarn",
}
"""Every part of YaRN shows in short texts."""

# Transformers has no experts that are chosen in blocks: here a block admits all.
CASES = [
    (family, {"expert_capacity": 16} if family == "llada2_2" else {})
    for family in FAMILIES
] + [
    ("fast_dllm_v2", {"tie_word_embeddings": True}),
    ("sdar", {"head_dim": 64}),
    ("dream", {"head_dim": 128}),
    ("nemotron", {"rope_parameters": OTHER_YARN}),
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def loaded(folder: Path, seed: int = 0, family: str = "sdar", **changes) -> TinyModel:
    return TinyModel.from_folder(write_checkpoint(family, folder, seed=seed, **changes))


# --- The forward ---------------------------------------------------------------


def counterpart(family: str, folder: Path) -> torch.nn.Module:
    """Transformers' model with the weights in `folder`, which is changed for it."""
    if family in RENAMED:
        weights = RENAMED[family](load_file(folder / "model.safetensors"))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    name, changes = COUNTERPARTS[family]
    config = json.loads((folder / "config.json").read_text())
    for key in ("architectures", "auto_map", "model_type"):
        del config[key]
    changes = changes | {"attn_implementation": "eager"}
    config = getattr(transformers, f"{name}Config")(**config | changes)
    model, report = getattr(transformers, f"{name}ForCausalLM").from_pretrained(
        folder, config=config, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
    return model.eval()


def as_glm(bailing: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows of query_key_value: 4 heads of queries, 2 of keys, 2 of values, 32 each."""
    glm = {}
    for name, weight in bailing.items():
        if name.endswith("attention.query_key_value.weight"):
            for letter, low, high in (("q", 0, 128), ("k", 128, 192), ("v", 192, 256)):
                part = f"self_attn.{letter}_proj"
                part = name.replace("attention.query_key_value", part)
                glm[part] = weight[low:high].clone()
            continue
        name = name.replace("word_embeddings", "embed_tokens")
        name = name.replace("attention.dense", "self_attn.o_proj")
        name = name.replace("attention.query_layernorm", "self_attn.q_norm")
        name = name.replace("attention.key_layernorm", "self_attn.k_norm")
        name = name.replace("expert_bias", "e_score_correction_bias")
        glm[name] = weight
    return glm


def as_ministral(nemotron: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ministral = {}
    for name, weight in nemotron.items():
        name = name.replace("diffusion_head.", "lm_head.")
        ministral[name.replace("encoder.", "model.")] = weight
    return ministral


RENAMED = {"llada2": as_glm, "llada2_2": as_glm, "nemotron": as_ministral}


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_forward_equals_transformers(tmp_path, family, changes):
    ours = loaded(tmp_path, seed=1, family=family, **changes)
    theirs = counterpart(family, tmp_path)
    ids = torch.randint(0, 128, (LENGTH,), generator=torch.Generator().manual_seed(0))
    everyone = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    for visible in (everyone, block_causal(LENGTH, 8), block_causal(LENGTH, 8, 3)):
        hidden = torch.zeros(LENGTH, LENGTH).masked_fill(~visible, -torch.inf)
        with torch.no_grad():
            expected = theirs(ids[None], attention_mask=hidden[None, None]).logits[0]
        logits = ours.forward(ids, visible=visible)
        rounding = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(logits, expected, atol=rounding, rtol=0)
    torch.testing.assert_close(
        ours.forward(ids), ours.forward(ids, visible=everyone), atol=0, rtol=0
    )


def test_block_causal_by_hand():
    def seen(*args: int) -> list[list[int]]:
        return block_causal(*args).int().tolist()

    assert seen(4, 2) == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert seen(3, 2) == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert seen(2, 1) == [[1, 0], [1, 1]]
    # Blocks counted from 1: what is left of it is a block of its own.
    assert seen(4, 2, 1) == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    # Counted from 3, backwards too: 0 | 1 2 | 3.
    assert seen(4, 2, 3) == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert seen(3, 8, 2) == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]


def test_causal_context_by_hand():
    def seen(*args: int) -> list[list[int]]:
        return causal_context(*args).int().tolist()

    assert seen(4, 2) == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert seen(2, 0) == [[1, 1], [1, 1]]
    assert seen(2, 2) == [[1, 0], [1, 1]]


def test_rows_left_of_a_block_do_not_depend_on_it(tmp_path):
    model = loaded(tmp_path)
    row = PROMPT + [model.mask_id] * 9
    visible = block_causal(16, 8)
    before = model.forward(row, visible=visible)
    after = model.forward([*row[:12], 33, *row[13:]], visible=visible)
    torch.testing.assert_close(before[:8], after[:8], atol=0, rtol=0)
    assert ((before - after)[8:].abs().amax(-1) > 1e-3).all()


def test_cached_forward_equals_full_forward_when_nothing_changed(tmp_path):
    model = loaded(tmp_path, family="dream")
    row = PROMPT + [model.mask_id] * 16
    store = model.new_store(len(row))
    full = model.forward(row, store=store)
    for low, high in [(0, 23), (7, 23), (7, 15), (22, 23)]:
        part = model.forward(row[low:high], list(range(low, high)), store)
        torch.testing.assert_close(part, full[low:high], atol=1e-4, rtol=1e-4)


def test_store_filled_block_by_block_equals_one_block_causal_forward(tmp_path):
    """Rows of the store that are not visible may be unwritten."""
    model = loaded(tmp_path, family="llada2")
    row = PROMPT + [model.mask_id] * 9
    visible = block_causal(16, 4)
    store = model.new_store(16)
    parts = [
        model.forward(row[i : i + 4], range(i, i + 4), store, visible[i : i + 4])
        for i in range(0, 16, 4)
    ]
    expected = model.forward(row, visible=visible)
    torch.testing.assert_close(torch.cat(parts), expected, atol=1e-4, rtol=1e-4)


def test_oracle_refuses_an_architecture_that_it_does_not_know(tmp_path):
    folder = write_checkpoint("sdar", tmp_path, seed=0)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="SDARForCausalLM, .* not LlamaForCausalLM"):
        TinyModel.from_folder(folder)


# --- Routing -------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llada_moe", "sdar_moe", "llada2"])
def test_experts_are_chosen_by_a_margin(tmp_path, family):
    """Far beyond float32 rounding, so that no program chooses otherwise."""
    model = loaded(tmp_path, family=family)
    layer = "model.layers.1.mlp."
    seen = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    chosen = model.expert_weights(seen, layer) > 0
    noise = 1e-4 * torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    moved = (chosen != (model.expert_weights(seen + noise, layer) > 0)).any(-1)
    assert moved.sum() <= 1
    assert (chosen.sum(-1) == model.config["num_experts_per_tok"]).all()
    assert chosen.any(0).float().mean() > 0.8, "most experts are chosen by some row"


def test_llada2_chooses_by_bias_and_group_and_weighs_without_them(tmp_path):
    """The rule again for one row at a time, with sorted lists of Python numbers."""
    model = loaded(tmp_path, family="llada2")
    layer = "model.layers.1.mlp."
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    logits = rows @ model.weights[layer + "gate.weight"].T
    bias = model.weights[layer + "gate.expert_bias"].tolist()
    weights = model.expert_weights(rows, layer)
    without_bias = without_groups = 0
    for row, found in zip(logits.sigmoid().tolist(), weights.tolist(), strict=True):
        biased = [score + bias[e] for e, score in enumerate(row)]
        groups = [range(first, first + 4) for first in range(0, 16, 4)]
        groups.sort(key=lambda g: sum(sorted(biased[e] for e in g)[-2:]))
        candidates = [e for group in groups[-2:] for e in group]
        chosen = sorted(candidates, key=lambda e: biased[e])[-3:]
        total = sum(row[e] for e in chosen)
        expected = [2.5 * row[e] / total if e in chosen else 0.0 for e in range(16)]
        assert found == pytest.approx(expected, abs=1e-5)
        without_groups += set(chosen) != set(
            sorted(range(16), key=biased.__getitem__)[-3:]
        )
        without_bias += set(chosen) != set(sorted(candidates, key=row.__getitem__)[-3:])
    # Both rules mattered, or the comparison would be empty.
    assert without_groups > 5 and without_bias > 5


def test_llada2_2_chooses_among_the_experts_of_a_block(tmp_path):
    """The rule again for one block at a time, with sorted lists of Python numbers."""
    model = loaded(tmp_path, family="llada2_2")
    layer = "model.layers.1.mlp."
    rows = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    logits = rows @ model.weights[layer + "gate.weight"].T
    bias = model.weights[layer + "gate.expert_bias"].tolist()
    weights = model.expert_weights(rows, layer, torch.arange(16, 64))
    restricted = 0
    for first in range(0, 48, 8):
        scores = logits[first : first + 8].sigmoid().tolist()
        biased = [[s + b for s, b in zip(row, bias, strict=True)] for row in scores]
        highest = [max(row[e] for row in biased) for e in range(16)]
        admitted = sorted(range(16), key=highest.__getitem__)[-6:]
        for row, choice, found in zip(
            scores, biased, weights[first : first + 8].tolist(), strict=True
        ):
            chosen = sorted(admitted, key=choice.__getitem__)[-3:]
            total = sum(row[e] for e in chosen)
            expected = [2.5 * row[e] / total if e in chosen else 0.0 for e in range(16)]
            assert found == pytest.approx(expected, abs=1e-5)
            restricted += set(chosen) != set(
                sorted(range(16), key=choice.__getitem__)[-3:]
            )
    assert restricted > 5


# --- The checkpoints -----------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_is_eventful(tmp_path, family):
    """Masked rows differ in what they predict, and in how sure they are."""
    confidence, token = [], []
    for seed in range(3):
        model = loaded(tmp_path / str(seed), family=family, seed=seed)
        logits = model.forward(PROMPT + [model.mask_id] * 32)[len(PROMPT) :]
        best = logits.softmax(-1).max(-1)
        confidence.append(best.values)
        token += best.indices.tolist()
    least, most = torch.cat(confidence).aminmax()
    assert least < 0.3 and 0.9 < most < 1
    assert len(set(token)) >= 12


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_tensor_names(tmp_path):
    layer = "model.layers.1."
    bailing = names(write_checkpoint("llada2", tmp_path / "llada2", seed=0))
    assert {
        "model.word_embeddings.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.mlp.gate_proj.weight",
        layer + "input_layernorm.weight",
        layer + "attention.query_key_value.weight",
        layer + "attention.query_layernorm.weight",
        layer + "attention.dense.weight",
        layer + "mlp.gate.weight",
        layer + "mlp.gate.expert_bias",
        layer + "mlp.experts.15.down_proj.weight",
        layer + "mlp.shared_experts.up_proj.weight",
    } <= bailing
    assert not any("self_attn" in name or "embed_tokens" in name for name in bailing)
    sdar = names(write_checkpoint("sdar_moe", tmp_path / "sdar", seed=0))
    assert {
        "lm_head.weight",
        layer + "self_attn.q_norm.weight",
        layer + "mlp.gate.weight",
        layer + "mlp.experts.7.up_proj.weight",
    } <= sdar
    tied = names(write_checkpoint("a2d_qwen2", tmp_path / "a2d", seed=0))
    assert layer + "self_attn.k_proj.bias" in tied
    assert "lm_head.weight" not in tied
    nemotron = names(write_checkpoint("nemotron", tmp_path / "nemotron", seed=0))
    assert {
        "encoder.embed_tokens.weight",
        "encoder.layers.1.self_attn.q_proj.weight",
        "encoder.norm.weight",
        "diffusion_head.weight",
    } <= nemotron
    assert all(name.startswith(("encoder.", "diffusion_head.")) for name in nemotron)


def test_configs_lack_what_the_released_ones_lack(tmp_path):
    def config(family: str, **changes) -> dict:
        folder = write_checkpoint(family, tmp_path / family, seed=0, **changes)
        return json.loads((folder / "config.json").read_text())

    sdar = config("sdar")
    assert "block_size" not in sdar and "fuse_cross_entropy" in sdar
    assert config("sdar", block_size=8)["block_size"] == 8
    assert not {"intermediate_size", "head_dim"} & config("llada_moe").keys()
    assert not {"rotary_dim", "router_dtype"} & config("llada2").keys()
    assert config("fast_dllm_v2")["bd_size"] == 32
    assert config("dream")["model_type"] == "Dream"
    assert "rope_theta" not in config("nemotron")
    assert all("auto_map" in config(family) for family in FAMILIES)


def test_checkpoint_depends_on_the_seed_alone(tmp_path):
    a, b, c = (
        loaded(tmp_path / name, seed=seed).weights
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


def test_unknown_family_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'mamba' is not one of llada_moe, llada2"):
        write_checkpoint("mamba", tmp_path, seed=0)
