# SPDX-License-Identifier: Apache-2.0
"""Every family's tensors: all used, all there, or the start ends and names them.

No engine: vLLM's model classes, built as a worker builds them, and their loaders.
"""

import re

import pytest
import torch
from model_cases import ALL, load, write
from safetensors.torch import load_file
from tiers import fast

MIXTURES = ["llada_moe", "llada2", "llada2_2", "sdar_moe"]
FEW = ["llada", "llada2", "dream", "fast_dllm_v2"]
"""With joined and with separate projections, with experts, with tied embeddings."""


@pytest.fixture(scope="module")
def built(build, tmp_path_factory):
    """`built(family)`: its tiny model and the tensors of its checkpoint."""
    made = {}

    def get(family):
        if family not in made:
            folder = write(family, tmp_path_factory.mktemp("weights"))
            made[family] = (build(folder), load_file(folder / "model.safetensors"))
        return made[family]

    return get


def kinds(tensors) -> dict[str, str]:
    """A tensor of each kind: that of the last layer and expert."""
    return {re.sub(r"\d+", "N", name): name for name in tensors}


@pytest.mark.parametrize("family", ALL)
def test_every_kind_of_tensor_is_missed(built, family):
    model, tensors = built(family)
    load(model, tensors)
    for name in kinds(tensors).values():
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        with pytest.raises(ValueError) as error:
            load(model, rest)
        if ".query_key_value" not in name:
            assert f"missing: {name}" in str(error.value)
        assert "left over" not in str(error.value)


@pytest.mark.parametrize("family", fast(*FEW, of=ALL))
def test_misnamed_and_left_over_tensors_are_named(built, family):
    model, tensors = built(family)
    for name in kinds(tensors).values():
        wrong = name.replace(".weight", "_.weight").replace(".bias", "_.bias")
        wrong = wrong if wrong != name else name + "_"
        renamed = {
            (wrong if other == name else other): tensor
            for other, tensor in tensors.items()
        }
        with pytest.raises(ValueError) as error:
            load(model, renamed)
        assert f"missing: {name}; left over: {wrong}" in str(error.value)
    for extra in ("model.layers.0.self_attn.q_lora.weight", "transformer.h.0.weight"):
        with pytest.raises(ValueError, match=f"left over: {extra}$"):
            load(model, tensors | {extra: torch.ones(2, 2)})


@pytest.mark.parametrize("family", fast(*FEW, of=ALL))
def test_other_shapes_are_named(built, family):
    """Larger ones too, of which vLLM's loaders would take a part."""
    model, tensors = built(family)
    for name in kinds(tensors).values():
        tensor = tensors[name]
        for other in (torch.cat([tensor, tensor]), tensor[:-1], tensor[None]):
            with pytest.raises(ValueError, match="of another shape: ") as error:
                load(model, tensors | {name: other})
            assert f"{name} ({list(other.shape)} where" in str(error.value)


@pytest.mark.parametrize("family", ALL)
def test_what_says_nothing_may_be_left_over(built, family):
    model, tensors = built(family)
    name = next(name for name in tensors if ".0." in name)
    layer = name[: name.index(".0.") + 3]
    harmless = {
        f"{layer}self_attn.rotary_emb.inv_freq": torch.ones(16),
        "model.rotary_emb.inv_freq": torch.ones(16),
        f"{layer}rotary_emb.cos_cached": torch.ones(16),
        "model.embeddings.position_ids": torch.arange(16),
        # GPTQ's files have such.
        name.replace(".weight", ".bias"): torch.zeros(4),
    }
    load(model, {**harmless, **tensors})


def test_long_lists_are_shortened(built):
    model, tensors = built("llada2")
    few = {name: t for name, t in tensors.items() if "experts" not in name}
    many = {f"x.{number}": torch.ones(1) for number in range(1000)}
    with pytest.raises(ValueError) as error:
        load(model, few | many)
    assert len(str(error.value)) < 2000
    assert "this LLaDA2 model" in str(error.value)
    assert "(1000 in all)" in str(error.value)


def stacked(tensors, layout):
    """The same weights, experts stacked: per projection, or gate and up in one."""
    names: dict[str, dict[int, torch.Tensor]] = {}
    rest = {}
    for name, tensor in tensors.items():
        match = re.match(r"(.*\.experts)\.(\d+)\.(.*)\.weight", name)
        if match is None:
            rest[name] = tensor
        else:
            names.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
    stacks = {
        name: torch.stack([parts[number] for number in range(len(parts))])
        for name, parts in names.items()
    }
    if layout == "gate and up":
        for name in [name for name in stacks if name.endswith(".gate_proj")]:
            up = stacks.pop(name.replace("gate_proj", "up_proj"))
            both = torch.cat([stacks.pop(name), up], dim=1)
            stacks[name.replace("gate_proj", "gate_up_proj")] = both
    assert stacks
    return rest | stacks


@pytest.mark.parametrize("layout", ["per projection", "gate and up"])
@pytest.mark.parametrize("family", MIXTURES)
def test_stacked_experts(built, family, layout):
    model, tensors = built(family)
    load(model, tensors)
    wanted = {name: p.clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    stacks = stacked(tensors, layout)
    load(model, stacks)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=0, atol=0)
    # And what comes later, in parts, is not compared, but unstacked too.
    part = next(name for name in stacks if "experts" in name and "shared" not in name)
    model.load_weights([(part, stacks[part])])

    for name in kinds(stacks).values():
        rest = {other: t for other, t in stacks.items() if other != name}
        with pytest.raises(ValueError, match="missing: "):
            load(model, rest)
        if "experts." in name and "shared" not in name:
            for other in (stacks[name][:-1], stacks[name][:, :-1]):
                with pytest.raises(ValueError, match=r"missing|of another shape"):
                    load(model, stacks | {name: other})


@pytest.mark.parametrize("family", ["a2d_qwen3", "a2d_qwen2"])
def test_tied_embeddings(built, family):
    """A head beside them is the same, or it is not tied."""
    model, tensors = built(family)
    embedding = tensors["model.embed_tokens.weight"]
    load(model, tensors | {"lm_head.weight": embedding.clone()})
    with pytest.raises(ValueError, match=r"lm_head.weight .*tie_word_embeddings"):
        load(model, tensors | {"lm_head.weight": embedding + 1})


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_of_other_ranks_may_be_absent(built, family, monkeypatch):
    """With expert parallelism vLLM does not even read them; this rank's are needed."""
    from vllm_dlm.model_executor.models.weights import WeightCheck

    model, tensors = built(family)
    layer = next(m for m in model.modules() if hasattr(m, "ckpt_gate_proj_name"))
    places = torch.full((layer.moe_config.num_experts,), -1)
    places[2], places[5] = 0, 1
    monkeypatch.setattr(type(layer), "expert_map", property(lambda self: places))

    def check(kept):
        watch = WeightCheck(model)
        handed_on = dict(watch.used(kept.items()))
        watch.finish()
        return handed_on

    def is_of(name, *numbers):
        match = re.search(r"\.experts\.(\d+)\.", name)
        return match is None or int(match[1]) in numbers

    own = {name: t for name, t in tensors.items() if is_of(name, 2, 5)}
    assert set(check(own)) == set(own)
    assert set(check(tensors)) == set(tensors)
    with pytest.raises(ValueError, match=r"missing: .*experts\.5\."):
        check({name: t for name, t in tensors.items() if is_of(name, 2)})


def test_weights_that_are_sent_in_parts(built, monkeypatch):
    """To a server that began without: what comes is loaded, and not compared."""
    from vllm.config import get_current_vllm_config

    model, tensors = built("llada")
    monkeypatch.setattr(get_current_vllm_config().load_config, "load_format", "dummy")
    name = "model.transformer.blocks.1.ff_out.weight"
    monkeypatch.setattr(model, "_is_loaded", False)
    model.load_weights([(name, tensors[name] + 1)])
    loaded = model.model.layers[1].mlp.down_proj.weight
    torch.testing.assert_close(loaded.data, tensors[name] + 1)
