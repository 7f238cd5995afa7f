# SPDX-License-Identifier: Apache-2.0
"""Modules that a quantised checkpoint names: each of every family, in every format."""

import itertools
import re

import pytest
from model_cases import ALL, load, write
from reference.quantised import quantise
from safetensors.torch import load_file

from vllm_dlm.model_executor.models.names import LLADA_NAMES, NEMOTRON_NAMES
from vllm_dlm.model_executor.models.tables import ARCHITECTURES
from vllm_dlm.registry import load as load_class


@pytest.mark.parametrize("architecture", ["LLaDAModelLM", "NemotronLabsDiffusionModel"])
def test_every_module_and_all_that_is_in_it(architecture):
    names = LLADA_NAMES if architecture == "LLaDAModelLM" else NEMOTRON_NAMES
    mapper = load_class(ARCHITECTURES[architecture]).hf_to_vllm_mapper
    mapper = mapper.get_rename_mapper()
    modules = names.modules(12)
    assert len(set(modules.values())) == len(modules) == 3 + 12 * 9
    for theirs, ours in modules.items():
        assert mapper.map_name(theirs) == ours
        assert mapper.map_name(f"{theirs}.weight") == f"{ours}.weight"
        assert mapper.map_name(f"{theirs}.lora_A.weight") == f"{ours}.lora_A.weight"
        assert mapper.map_name(ours) == ours
        # No name is a part of a longer one.
        assert (
            mapper.map_name(f"{theirs}_").rpartition(".")[2]
            == (f"{theirs}_".rpartition(".")[2])
        )
    theirs, ours = names.layers
    assert mapper.map_name(f"{theirs}.11") == f"{ours}.11"
    assert mapper.map_name(theirs) == ours


BLOCK = "model.transformer.blocks"
DOWN = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
WITH_HEAD = ["lm_head", *DOWN]


@pytest.mark.parametrize(
    ("listed", "meant"),
    [
        (f"{BLOCK}.0.ff_out", DOWN[:1]),
        ("model.transformer.ff_out", ["lm_head"]),
        # bitsandbytes and AWQ name parts of names.
        ("ff_out", WITH_HEAD),
        ("0.ff_out", DOWN[:1]),
        ("re:.*ff_out$", WITH_HEAD),
        (r"re:.*blocks\.1\.ff_out", DOWN[1:]),
        ("*.blocks.*.ff_out", DOWN),
        ("*ff_out*", WITH_HEAD),
        ("lm_head", ["lm_head"]),
        ("re:.*lm_head", ["re:.*lm_head"]),
        ("Linear", ["Linear"]),
        (
            f"{BLOCK}.1",
            [
                "model.layers.1.input_layernorm",
                "model.layers.1.self_attn.q_proj",
                "model.layers.1.self_attn.k_proj",
                "model.layers.1.self_attn.v_proj",
                "model.layers.1.self_attn.o_proj",
                "model.layers.1.post_attention_layernorm",
                "model.layers.1.mlp.gate_proj",
                "model.layers.1.mlp.up_proj",
                "model.layers.1.mlp.down_proj",
            ],
        ),
    ],
)
def test_ways_of_naming_modules(listed, meant):
    formats = {
        "ignore": [listed],
        "ignored_layers": [listed],
        "modules_to_not_convert": [listed],
        "llm_int8_skip_modules": [listed],
        "exclude_modules": [listed],
        "modules_in_block_to_quantize": [[listed]],
        "extra_config": {listed: {"bits": 16}},
        "config_groups": {"group_0": {"targets": [listed], "weights": {"num_bits": 8}}},
        "bits": 8,
        "desc_act": False,
    }
    translated = LLADA_NAMES.translate(formats, 2)
    assert translated == {
        "ignore": meant,
        "ignored_layers": meant,
        "modules_to_not_convert": meant,
        "llm_int8_skip_modules": meant,
        "exclude_modules": meant,
        "modules_in_block_to_quantize": [meant],
        "extra_config": {name: {"bits": 16} for name in meant},
        "config_groups": {"group_0": {"targets": meant, "weights": {"num_bits": 8}}},
        "bits": 8,
        "desc_act": False,
    }
    assert LLADA_NAMES.translate(translated, 2) == translated


def test_rules_of_gptq():
    rules = {"-:.*ff_out": {}, r"+:.*blocks\.0\.attn_out": {"bits": 4}}
    (no, rule), (yes, more) = LLADA_NAMES.translate({"dynamic": rules}, 2)[
        "dynamic"
    ].items()
    assert (no[:2], rule, yes[:2], more) == ("-:", {}, "+:", {"bits": 4})
    assert [name for name in (*DOWN, "lm_head") if re.match(no[2:], name)] == [
        *DOWN,
        "lm_head",
    ]
    assert re.match(yes[2:], "model.layers.0.self_attn.o_proj")
    assert not re.match(yes[2:], "model.layers.1.self_attn.o_proj")


def linear_modules(tensors) -> list[str]:
    """Modules with a matrix, but for embeddings, heads, routers."""
    return [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if tensor.dim() == 2
        and not any(
            part in name
            for part in ("embed", "wte", "head", "transformer.ff_out", "mlp.gate.")
        )
    ]


# Layers that vLLM fuses are left together; so are all experts of a layer.
LEFT = {
    "llada": (".0.attn_out", ".0.ff_out"),
    "llada2": (".0.attention.dense", ".0.mlp.down_proj"),
}


# Those with names or layers of their own; the rest are vLLM's classes.
QUICK = [("llada", "name"), ("llada", "re"), ("nemotron", "re"), ("llada2", "name")]


@pytest.mark.parametrize(
    ("family", "way"),
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
        for case in itertools.product(
            [name for name in ALL if "moe" not in name], ("name", "re")
        )
    ],
)
def test_partly_quantised_checkpoints(build, tmp_path, family, way):
    """Which layers are quantised, and that all their tensors are used and needed."""
    folder = write(family, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    ends = LEFT.get(family, (".0.self_attn.o_proj", ".0.mlp.down_proj"))
    left = [name for name in linear_modules(tensors) if name.endswith(ends)]
    # Experts, which the CPU's kernels do not take so, and all that is not linear.
    rest = set(tensors) - {f"{name}.weight" for name in linear_modules(tensors)}
    rest = {name.removesuffix(".weight") for name in rest} | {
        name for name in linear_modules(tensors) if "expert" in name
    }
    ignore = left if way == "name" else [f"re:.*{end}$" for end in ends]
    head = [name for name in rest if "head" in name or name.endswith("former.ff_out")]
    ignore = [*ignore, *head, *([] if family != "llada2" else ["re:.*expert.*"])]
    quantise(folder, lambda name: name in left or name in rest, ignore)
    model = build(folder)
    quantised = load_file(folder / "model.safetensors")
    load(model, quantised)
    names = LLADA_NAMES if family == "llada" else NEMOTRON_NAMES
    ours = names.modules(2) if family in ("llada", "nemotron") else {}
    plain = {
        name
        for name, module in model.named_modules()
        if type(getattr(module, "quant_method", None)).__name__
        == "UnquantizedLinearMethod"
    }
    for name in left:
        assert ours.get(name, name) in plain
    wide = [name for name in plain if name.endswith(("qkv_proj", "query_key_value"))]
    assert not wide

    scales = [name for name in quantised if name.endswith(".weight_scale")]
    assert scales
    for name in (scales[-1], scales[-1].removesuffix("_scale"), f"{left[0]}.weight"):
        without = {other: t for other, t in quantised.items() if other != name}
        with pytest.raises(ValueError, match=f"missing: {name}$"):
            load(model, without)
