# SPDX-License-Identifier: Apache-2.0
"""Released configs of every family, read the way vLLM reads them."""

import json

import pytest
import torch

from vllm_dlm import aliases, plugin
from vllm_dlm.model_defaults import ModelDefaults
from vllm_dlm.model_executor.models.declarations import (
    check_declarations,
    checkpoint_name,
)

COUNTED = {"strict": True, "at_least": "scheduled"}

# The fields of the released config.json that matter, and no others: what is missing
# here is missing there.
QWEN = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SDAR = QWEN | {
    "architectures": ["SDARForCausalLM"],
    "model_type": "sdar",
    "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig"},
    "attn_implementation": "flex_attention",
    "fuse_cross_entropy": True,
    "use_deepep": False,
    "micro_forward": False,
    "debug": False,
    "attention_bias": False,
    "eos_token_id": 151643,
    "head_dim": 128,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
SDAR_MOE = SDAR | {
    "architectures": ["SDARMoeForCausalLM"],
    "model_type": "sdar_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
LLADA = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig"},
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "max_sequence_length": 4096,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "weight_tying": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "attention_layer_norm": False,
    "alibi": False,
}
LLADA_MOE = {
    "architectures": ["LLaDAMoEModelLM"],
    "model_type": "llada",
    "auto_map": {"AutoConfig": "configuration_lladamoe.LLaDAConfig"},
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "expert_intermediate_size": 1024,
    "dense_intermediate_size": 8192,
    "moe_layer_freq": [1] * 16,
    "shared_expert_intermediate_size": None,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "norm_topk_prob": None,
    "qk_layernorm": True,
    "partial_rotary_factor": 1.0,
    "rope_theta": 50000,
    "rope_scaling": None,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "vocab_size": 157184,
    "tie_word_embeddings": False,
    "eos_token_id": 156892,
    "pad_token_id": 156892,
}
LLADA2 = {
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    "auto_map": {"AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig"},
    "hidden_size": 2048,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "score_function": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "use_qkv_bias": False,
    "use_bias": False,
    "partial_rotary_factor": 0.5,
    "rope_scaling": None,
    "rope_theta": 600000,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "vocab_size": 157184,
    "tie_word_embeddings": False,
    "pad_token_id": 156892,
    "sliding_window": 4096,
    "use_sliding_window": False,
}
DREAM = QWEN | {
    "architectures": ["DreamModel"],
    "model_type": "Dream",
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig"},
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "mask_token_id": 151666,
    "eos_token_id": 151643,
    "pad_token_id": 151643,
}
FAST_DLLM = QWEN | {
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "model_type": "Fast_dLLM_Qwen",
    "auto_map": {"AutoConfig": "configuration.Fast_dLLM_QwenConfig"},
    "bd_size": 32,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "layer_types": ["full_attention"] * 28,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "eos_token_id": 151645,
    "pad_token_id": 151645,
}
A2D_QWEN3 = QWEN | {
    "architectures": ["A2DQwen3LMHeadModel"],
    "model_type": "a2d-qwen3",
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "eos_token_id": 151645,
}
A2D_QWEN2 = QWEN | {
    "architectures": ["A2DQwen2LMHeadModel"],
    "model_type": "a2d-qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "max_window_layers": 24,
    "tie_word_embeddings": True,
    "eos_token_id": 151645,
}
NEMOTRON = {
    "architectures": ["NemotronLabsDiffusionModel"],
    "model_type": "nemotron_labs_diffusion",
    "auto_map": {
        "AutoConfig": (
            "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig"
        ),
        "AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel",
    },
    "attention_bias": False,
    "attn_implementation": "sdpa",
    "block_size": 32,
    "bos_token_id": 1,
    "dlm_paradigm": "bidirectional",
    "eos_token_id": 11,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 9216,
    "mask_token_id": 100,
    "max_position_embeddings": 262144,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 26,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 16.0,
        "llama_4_scaling_beta": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": 1000000.0,
        "rope_type": "yarn",
    },
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 131072,
}

RELEASED = {
    "LLaDA-8B-Instruct": (
        LLADA,
        ModelDefaults("threshold", 32, 126336, 126081, "A", stop_ids=(126348,)),
        {
            "hidden_size": 4096,
            "num_key_value_heads": 32,
            "intermediate_size": 12288,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "LLaDA-MoE-7B-A1B-Instruct": (
        LLADA_MOE,
        ModelDefaults("threshold", 32, 156895, 156892, "A"),
        {
            "norm_topk_prob": False,
            "moe_intermediate_size": 1024,
            "num_experts": 64,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "shared_expert_intermediate_size": 0,
        },
    ),
    "LLaDA2.0-mini": (
        LLADA2,
        ModelDefaults(
            "threshold",
            32,
            156895,
            156892,
            "B",
            block_origin="start",
            reference_confidence="drawn",
            strategy_config=COUNTED | {"threshold": 0.95},
        ),
        {
            "use_rmsnorm": True,
            "use_qk_norm": True,
            "router_dtype": "fp32",
            "moe_router_enable_expert_bias": True,
            "rotary_dim": 64,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 600000,
                "partial_rotary_factor": 0.5,
            },
            "embedding_dropout": 0.0,
            "sliding_window": None,
        },
    ),
    "Dream-v0-Instruct-7B": (
        DREAM,
        ModelDefaults(
            "threshold",
            32,
            151666,
            151643,
            "A",
            stop_ids=(151645, 151643),
            shift=1,
            reference_confidence="drawn",
            strategy_config={"threshold": 0.9},
        ),
        {"num_key_value_heads": 4, "layer_types": ["full_attention"] * 28},
    ),
    "SDAR-4B-Chat-b16": (
        SDAR,
        ModelDefaults(
            "threshold",
            16,
            151669,
            151643,
            "B",
            stop_ids=(151645, 151643),
            block_origin="start",
            reference_confidence="drawn",
            strategy_config=COUNTED | {"threshold": 0.9},
        ),
        {"head_dim": 128, "tie_word_embeddings": False, "sliding_window": None},
    ),
    "SDAR-30B-A3B-Chat": (
        SDAR_MOE,
        ModelDefaults(
            "threshold",
            4,
            151669,
            151643,
            "B",
            stop_ids=(151645, 151643),
            block_origin="start",
            reference_confidence="drawn",
            strategy_config=COUNTED | {"threshold": 0.9},
        ),
        {"num_experts": 128, "norm_topk_prob": True},
    ),
    "Fast_dLLM_v2_1.5B": (
        FAST_DLLM,
        ModelDefaults(
            "threshold",
            32,
            151665,
            151645,
            "B",
            stop_ids=(151645,),
            shift=1,
            sub_block_length=8,
            block_origin="start",
            reference_confidence="drawn",
            strategy_config={"threshold": 0.9, "strict": True, "at_least": "best"},
        ),
        {"tie_word_embeddings": True},
    ),
    "Qwen3-0.6B-diffusion-mdlm-v0.1": (
        A2D_QWEN3,
        ModelDefaults(
            "threshold",
            32,
            151669,
            151645,
            "A",
            stop_ids=(151645, 151643),
            schedule="rounded",
        ),
        {"head_dim": 128, "tie_word_embeddings": True},
    ),
    "Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm-v0.1": (
        A2D_QWEN2,
        ModelDefaults(
            "threshold",
            32,
            151665,
            151645,
            "B",
            stop_ids=(151645, 151643),
            schedule="rounded",
        ),
        {"num_key_value_heads": 2},
    ),
    "Nemotron-Labs-Diffusion-3B": (
        NEMOTRON,
        ModelDefaults(
            "threshold",
            32,
            100,
            11,
            "C",
            seeds=True,
            strategy_config={"threshold": 0.9},
        ),
        {
            "head_dim": 128,
            "tie_word_embeddings": False,
            "rope_parameters": NEMOTRON["rope_parameters"],
            "llama_4_scaling": {
                "beta": 0.1,
                "original_max_position_embeddings": 16384,
            },
        },
    ),
}


@pytest.fixture
def read(tmp_path):
    """Writes a config.json and reads it as vLLM does, without remote code."""
    from vllm.transformers_utils.config import get_config

    plugin.register()

    def read_config(fields, name="model"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(fields))
        return get_config(str(folder), trust_remote_code=False)

    return read_config


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs(read, name):
    released, declared, standard = RELEASED[name]
    config = read(released, name)
    assert ModelDefaults.from_hf_config(config) == declared
    assert config.canvas_length == declared.block_length
    assert {field: getattr(config, field) for field in standard} == standard
    check_declarations(config)


@pytest.mark.parametrize("name", RELEASED)
def test_config_json_wins(read, name):
    own = {
        "mask_token_id": 7,
        "dlm_block_length": 5,
        "dlm_stop_ids": [3],
        "dlm_strategy_config": {"threshold": 0.5},
    }
    config = read(RELEASED[name][0] | own, name)
    assert {field: getattr(config, field) for field in own} == own


def test_another_mask_id_means_another_tokenizer(read):
    assert read(SDAR | {"mask_token_id": 7}).dlm_stop_ids == []


@pytest.mark.parametrize(
    ("name", "fields", "length"),
    [
        ("JetLM/SDAR-1.7B-Chat", {}, 4),
        ("JetLM/SDAR-8B-Chat-b64", {}, 64),
        ("JetLM/SDAR-8B-Chat-b32-GPTQ", {}, 32),
        ("models--JetLM--SDAR-4B-Chat-b8/snapshots/0123abcd", {}, 8),
        ("lulululuyi/TDAR-8B-Thinking", {}, 16),
        ("Gen-Verse/TraDo-4B-Instruct", {}, 4),
        ("SDAR-4B-Chat-b16", {"block_size": 8}, 8),
    ],
)
def test_sdar_block_length(read, name, fields, length):
    assert read(SDAR | fields, name).dlm_block_length == length


def test_checkpoint_names(tmp_path, monkeypatch):
    (tmp_path / "SDAR-b8").mkdir()
    monkeypatch.chdir(tmp_path / "SDAR-b8")
    for path, name in {
        "JetLM/SDAR-4B-Chat": "SDAR-4B-Chat",
        "/models/SDAR-4B/": "SDAR-4B",
        ".": "SDAR-b8",
        "": "",
    }.items():
        assert checkpoint_name({"name_or_path": path}) == name


def test_llada2_rotates_half_of_a_small_head(read):
    config = read(LLADA2 | {"head_dim": 16})
    assert config.rotary_dim == 8


def test_nemotron_takes_its_numbers_from_the_checkpoint(read):
    rope = NEMOTRON["rope_parameters"] | {
        "factor": 8.0,
        "llama_4_scaling_beta": 0.2,
        "original_max_position_embeddings": 4096,
    }
    config = read(NEMOTRON | {"rope_parameters": rope, "block_size": 16})
    assert config.rope_parameters == rope
    assert config.llama_4_scaling == {
        "beta": 0.2,
        "original_max_position_embeddings": 4096,
    }
    assert config.dlm_block_length == 16

    plain = {"rope_type": "default", "rope_theta": 10000.0}
    config = read(NEMOTRON | {"rope_parameters": plain}, "plain")
    assert config.rope_parameters == plain
    assert not hasattr(config, "llama_4_scaling")


def test_shift_of_a2d(read):
    assert read(A2D_QWEN3 | {"right_shift_logits": True}, "x-mdlm-y").dlm_shift == 1


def test_a2d_without_a_telling_name(read):
    config = read(A2D_QWEN3, "renamed")
    with pytest.raises(ValueError, match=r"dlm_class.*--hf-overrides"):
        check_declarations(config)
    config.update({"dlm_class": "B"})
    check_declarations(config)
    assert read(A2D_QWEN3 | {"dlm_class": "B"}, "other").dlm_class == "B"


@pytest.mark.parametrize(
    ("released", "fields", "message"),
    [
        (SDAR, {"use_regular_causal": True}, "use_regular_causal"),
        (DREAM, {"architectures": ["DreamForCausalLM"]}, "DreamReasoner"),
        (LLADA, {"include_qkv_bias": True}, "include_qkv_bias"),
        (LLADA_MOE, {"shared_expert_intermediate_size": 512}, "shared_expert"),
        (LLADA_MOE, {"moe_router_enable_expert_bias": True}, "expert_bias"),
        (LLADA_MOE, {"moe_layer_freq": [0] + [1] * 15}, "dense layers"),
        (LLADA2, {"use_sliding_window": True}, "use_sliding_window"),
        (NEMOTRON, {"attention_bias": True}, "attention_bias"),
        (NEMOTRON, {"sliding_window": 4096}, "sliding_window"),
    ],
)
def test_what_is_not_implemented_is_refused(read, released, fields, message):
    with pytest.raises(ValueError, match=message):
        read(released | fields)


@pytest.mark.parametrize(
    ("released", "fields", "message"),
    [
        (SDAR, {"vocab_size": 151669}, "mask_token_id 151669 is outside"),
        (DREAM, {"mask_token_id": -5}, "mask_token_id -5 is outside"),
        (LLADA2, {"dlm_block_length": 0}, "dlm_block_length 0"),
        (
            A2D_QWEN3
            | {"architectures": ["A2DLlamaLMHeadModel"], "model_type": "a2d-llama"},
            {"dlm_class": "A"},
            "mask_token_id is not known",
        ),
    ],
)
def test_impossible_declarations_are_refused(read, released, fields, message):
    with pytest.raises(ValueError, match=f"{message}.*--hf-overrides"):
        check_declarations(read(released | fields))


def test_every_alias_can_be_declared():
    for alias in aliases.ALIASES.values():
        config_class = plugin.load(plugin.HF_CONFIGS[alias.family.model_type])
        config = config_class.from_dict(
            {"architectures": [alias.family.architecture]}, name_or_path=alias.target
        )
        check_declarations(config)


@pytest.mark.parametrize("architecture", plugin.ARCHITECTURES)
def test_the_mixin_comes_first(architecture):
    from vllm_dlm.model_executor.models.diffusion import DiffusionModelMixin

    model_class = plugin.load(plugin.ARCHITECTURES[architecture])
    assert model_class.compute_logits is DiffusionModelMixin.compute_logits


def test_an_architecture_named_model_generates_text(read, tmp_path):
    from vllm.config import ModelConfig

    # vLLM takes unknown architectures that end in "Model" for embedding models.
    read(DREAM)
    config = ModelConfig(str(tmp_path / "model"), skip_tokenizer_init=True)
    assert config.runner_type == "generate"
    assert config.is_diffusion


def test_llada2_router_scores_stay_in_float32():
    from vllm_dlm.model_executor.models.llada2 import LLaDA2SparseMoE

    layer = LLaDA2SparseMoE.__new__(LLaDA2SparseMoE)
    torch.nn.Module.__init__(layer)
    scores = torch.rand(3, 4)
    layer.gate = lambda hidden_states: (scores, None)
    layer.experts = lambda hidden_states, router_logits: (hidden_states, router_logits)
    hidden_states = torch.rand(3, 8).bfloat16()
    output, used = layer.forward(hidden_states)
    assert used is scores
    assert output is hidden_states


def test_dream_tokenizer_needs_no_remote_code(tmp_path):
    from vllm.tokenizers import get_tokenizer

    plugin.register()
    vocabulary = ["h", "e", "l", "o", "Ġ", "he", "ll", "hell", "hello", "Ġhello"]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello"]
    added = {"<|endoftext|>": 10, "<|im_end|>": 11, "<|beginoftext|>": 12}
    added["<|mask|>"] = 13
    files = {
        "config.json": DREAM,
        "vocab.json": {token: id_ for id_, token in enumerate(vocabulary)},
        "tokenizer_config.json": {
            "tokenizer_class": "DreamTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
            "bos_token": "<|beginoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "mask_token": "<|mask|>",
            "unk_token": None,
            "added_tokens_decoder": {
                str(id_): {"content": token, "special": True, "normalized": False}
                for token, id_ in added.items()
            },
        },
        "added_tokens.json": added,
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    tokenizer = get_tokenizer(str(tmp_path), trust_remote_code=False)
    assert tokenizer.is_fast
    ids = tokenizer.encode("hello hello<|mask|><|im_end|>")
    assert ids == [8, 9, 13, 11]
    assert tokenizer.decode(ids) == "hello hello<|mask|><|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello hello"
    assert (tokenizer.mask_token_id, tokenizer.bos_token_id) == (13, 12)
