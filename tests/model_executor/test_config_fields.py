# SPDX-License-Identifier: Apache-2.0
"""config.json as others write it: other names, other types, other networks.

Every family is read or refused in one sentence that names the field.
"""

import pytest
from family_configs import CONFIGS, read, refusal
from released_configs import LLADA2, LLADA_MOE, RELEASED, SDAR
from tiers import fast

from vllm_dlm.config.model import EDIT_TOKEN_FIELDS, ModelDefaults
from vllm_dlm.model_executor.models.config_fields import KINDS, OTHER_NAMES
from vllm_dlm.model_executor.models.declarations import check_declarations

NO_FAMILY_OF_OURS = ("stable_diffcoder", "architectures")
"""Whatever else `architectures` says, it is another Llama: nothing of ours reads it."""

WRONG = ("x", True, 1.5, -1.5, [], ["x"], [1.5], {"a": 1}, float("nan"), 10**12, [[]])


@pytest.mark.parametrize("every", fast(4, of=(4, 1)))
@pytest.mark.parametrize("family", CONFIGS)
def test_wrong_types(family, every):
    """Fields times values: read, if the field may hold it, or one sentence about it.

    One value in `every`; each is tried with many fields.
    """
    fields = CONFIGS[family]
    read(fields)
    for number, (name, kind) in enumerate(KINDS.items()):
        if name == "model_type" or (family, name) == NO_FAMILY_OF_OURS:
            continue
        read(fields | {name: None})
        for value in WRONG[number % every :: every]:
            if not kind.accepts(value):
                text = refusal(fields | {name: value})
                assert name in text, (name, value)
            else:
                try:
                    read(fields | {name: value})
                except ValueError as error:
                    assert "cannot be read" not in str(error), (name, value)


@pytest.mark.parametrize("family", CONFIGS)
def test_wrong_types_in_overrides(family):
    fields = CONFIGS[family]
    for name, value in {
        "dlm_max_canvas": "x",
        "dlm_stop_ids": "x",
        "eos_token_id": "x",
        "mask_token_id": True,
        "dlm_shift": 2,
        "dlm_class": "D",
        "hidden_size": [1],
        "dlm_strategy_config": 3,
        "hidden_act": "gelu",
    }.items():
        assert name in refusal({name: value}, make=read(fields).update)
    # Values that are dictionaries reach a config by another way.
    with pytest.raises(ValueError, match="num_hidden_layers"):
        read(fields).num_hidden_layers = {"a": 1}
    with pytest.raises(ValueError, match="'dynamic'"):
        read(fields).rope_scaling = {"type": "dynamic", "factor": 2}


@pytest.mark.parametrize("family", CONFIGS)
def test_overrides_are_read_as_config_json_is(family):
    config = read(CONFIGS[family])
    config.dlm_server = "kept"
    config.update({"d_model": 512, "n_heads": 4, "n_kv_heads": 2, "head_dim": 128})
    config.update({"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (config.hidden_size, config.num_attention_heads) == (512, 4)
    assert config.num_key_value_heads == 2
    assert config.rope_parameters["rope_type"] == "linear"
    assert config.dlm_server == "kept"
    assert config.rope_parameters["rope_theta"] == (
        read(CONFIGS[family]).rope_parameters["rope_theta"]
        if family != "nemotron"
        else 10000.0
    )
    assert "_said" not in config.to_dict()


def test_an_override_of_the_block_size():
    config = read(SDAR)
    config.update({"block_size": 16})
    assert config.dlm_block_length == config.canvas_length == 16


@pytest.mark.parametrize("family", CONFIGS)
def test_other_names_and_orders(family):
    """Each standard name under each of its others, the fields in another order."""
    fields = CONFIGS[family]
    wanted = read(fields).to_dict()
    standard = {other: name for name, others in OTHER_NAMES.items() for other in others}
    plain = {standard.get(name, name): value for name, value in fields.items()}
    assert read(plain).to_dict() == wanted
    for number in range(max(map(len, OTHER_NAMES.values()))):
        renamed = {}
        for name, value in reversed(plain.items()):
            others = OTHER_NAMES.get(name, (name,))
            renamed[others[min(number, len(others) - 1)]] = value
        assert read(renamed).to_dict() == wanted
    nested = {"model_type": fields["model_type"], "text_config": plain}
    nested["architectures"] = fields["architectures"]
    assert read(nested).to_dict() == wanted


def test_two_names_that_disagree():
    text = refusal(SDAR | {"d_model": 7})
    assert "hidden_size 2560" in text
    assert "d_model 7" in text
    assert read(SDAR | {"d_model": 2560}).hidden_size == 2560


NOT_COMPUTED = {
    "activation_type": "gelu",
    "hidden_act": "gelu",
    "layer_norm_type": "default",
    "block_type": "sequential",
    "block_group_size": 2,
    "multi_query_attention": True,
    "alibi": True,
    "rope": False,
    "attention_layer_norm": None,
    "scale_logits": True,
    "input_emb_norm": True,
    "mlp_bias": True,
    "include_bias": True,
    "use_bias": True,
    "use_sliding_window": True,
    "attn_logit_softcapping": 30.0,
    "partial_rotary_factor": 0.25,
    "score_function": "other",
    "n_shared_experts": 3,
    "first_k_dense_replace": 3,
    "use_regular_causal": True,
    "vision_config": {"depth": 2},
    "layer_types": ["sliding_attention"],
    "architectures": ["AnotherModel"],
}
COMPUTED = {
    ("a2d_llama", "mlp_bias"),
    ("llada2", "partial_rotary_factor"),
    ("llada2", "n_shared_experts"),
    ("llada2", "first_k_dense_replace"),
    ("llada2_2", "partial_rotary_factor"),
    ("llada2_2", "n_shared_experts"),
    ("llada2_2", "first_k_dense_replace"),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_values_of_other_networks_are_refused(family):
    for name, value in NOT_COMPUTED.items():
        fields = {
            other: old
            for other, old in CONFIGS[family].items()
            if other != name and name not in OTHER_NAMES.get(other, ())
        }
        fields.pop(
            next((s for s, others in OTHER_NAMES.items() if name in others), ""), None
        )
        if (family, name) == NO_FAMILY_OF_OURS:
            continue
        if value is None or (family, name) in COMPUTED:
            read(fields | {name: value})
        else:
            assert name in refusal(fields | {name: value}), name


@pytest.mark.parametrize(
    ("family", "fields", "named"),
    [
        ("llada", {"attention_layer_norm": True}, "attention_layer_norm"),
        ("llada", {"include_qkv_bias": True}, "include_qkv_bias"),
        ("llada", {"num_experts": 8}, "num_experts"),
        ("llada", {"sliding_window": 64}, "sliding_window"),
        ("llada", {"d_model": 4097}, "hidden_size 4097"),
        ("llada", {"n_kv_heads": 5}, "num_key_value_heads 5"),
        ("sdar", {"attention_bias": True}, "attention_bias"),
        ("sdar", {"use_qk_norm": False}, "use_qk_norm"),
        ("dream", {"attention_bias": False}, "attention_bias"),
        ("dream", {"qk_norm": True}, "qk_norm"),
        ("llada2", {"score_function": "softmax"}, "score_function"),
        ("llada2", {"norm_topk_prob": False}, "norm_topk_prob"),
        (
            "llada2",
            {"moe_router_enable_expert_bias": False},
            "moe_router_enable_expert_bias",
        ),
        ("llada2", {"n_group": 7}, "n_group 7"),
        ("llada2", {"topk_group": 9}, "topk_group 9"),
        ("llada2", {"num_experts_per_tok": 200}, "num_experts_per_tok"),
        ("llada2", {"rotary_dim": 32}, "rotary_dim"),
        ("llada2", {"use_qkv_bias": True}, "use_qkv_bias"),
        (
            "llada2_2",
            {"expert_capacity": 7},
            "expert_capacity in the LLaDA2 config is 7",
        ),
        ("llada2_2", {"expert_capacity": 257}, "at most all 256"),
        ("sdar_moe", {"expert_capacity": 8}, "expert_capacity"),
        ("llada_moe", {"num_experts_per_tok": 65}, "num_experts_per_tok"),
        ("llada_moe", {"moe_router_score_function": "sigmoid"}, "score_function"),
        ("llada_moe", {"qk_layernorm": False}, "qk_layernorm"),
        ("sdar_moe", {"moe_layer_freq": [0, 1]}, "moe_layer_freq"),
    ],
)
def test_values_that_a_family_does_not_compute(family, fields, named):
    assert named in refusal(CONFIGS[family] | fields)


def test_model_types_of_trainers():
    """dllm's name for LLaDA-MoE, dFactory's for LLaDA2 with stacked experts."""
    moe = read(LLADA_MOE | {"model_type": "lladamoe"})
    assert moe.architectures == ["LLaDAMoEModelLM"]
    assert moe.moe_intermediate_size == 1024
    merged = read(LLADA2 | {"model_type": "llada2_moe_veomni"})
    assert merged.architectures == ["LLaDA2MoeModelLM"]


@pytest.mark.parametrize("family", CONFIGS)
def test_without_architectures(family):
    """The model type says it, and whether there are experts."""
    fields = {k: v for k, v in CONFIGS[family].items() if k != "architectures"}
    assert read(fields).architectures == CONFIGS[family]["architectures"]


@pytest.mark.parametrize("name", RELEASED)
def test_ids_outside_the_vocabulary_end_no_text(name):
    fields = RELEASED[name][0] | {"vocab_size": 64, "mask_token_id": 63}
    fields |= {"embedding_size": 64, "eos_token_id": [5, 64, -1]}
    fields |= {"dlm_stop_ids": [7, 10**9]}
    fields |= {e: 60 + i for i, e in enumerate(EDIT_TOKEN_FIELDS) if e in fields}
    config = read(fields, name_or_path=name)
    check_declarations(config)
    assert ModelDefaults.from_hf_config(config).stop_ids == (5, 7)
    # The family's own, where a smaller vocabulary keeps its mask id.
    smaller = RELEASED[name][0] | {"vocab_size": 130000, "embedding_size": 130000}
    config = read(smaller, name_or_path=name)
    if config.mask_token_id >= 130000:
        with pytest.raises(ValueError, match="outside the vocabulary"):
            check_declarations(config)
