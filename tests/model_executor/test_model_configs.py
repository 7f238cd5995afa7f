# SPDX-License-Identifier: Apache-2.0
"""Released configs of every family, read the way vLLM reads them."""

import copy
import json
import pickle

import pytest
import torch
from released_configs import (
    A2D_QWEN3,
    DREAM,
    DREAM_REASONER,
    LLADA,
    LLADA2,
    LLADA2_2,
    LLADA_MOE,
    NEMOTRON,
    RELEASED,
    SDAR,
    STABLE_DIFFCODER,
)

from vllm_dlm import plugin
from vllm_dlm.config import aliases
from vllm_dlm.config.model import EDIT_TOKEN_FIELDS, ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import resolve
from vllm_dlm.model_executor.models.declarations import (
    check_declarations,
    checkpoint_name,
)
from vllm_dlm.model_executor.models.tables import ARCHITECTURES, HF_CONFIGS
from vllm_dlm.registry import load
from vllm_dlm.strategies import STRATEGIES


@pytest.fixture
def read(tmp_path, no_retries):
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


def test_one_stop_id(read):
    assert read(SDAR | {"dlm_stop_ids": 3}).dlm_stop_ids == [3]


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


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("inclusionAI/LLaDA2.1-mini", "joint"),
        ("models--inclusionAI--LLaDA2.1-flash/snapshots/0123abcd", "joint"),
        ("llada2.1-mine", "joint"),
        ("inclusionAI/LLaDA2.0-mini", "threshold"),
        ("inclusionAI/LLaDA2.0-mini-CAP", "threshold"),
        ("mine", "threshold"),
    ],
)
def test_llada2_1_corrects_what_it_wrote(read, name, strategy):
    defaults = ModelDefaults.from_hf_config(read(LLADA2, name))
    params = resolve(DlmConfig(), None, defaults).params
    assert defaults.strategy == strategy
    assert isinstance(params, STRATEGIES[strategy].Params)
    if strategy == "joint":
        assert (params.mask_threshold, params.edit_threshold) == (0.7, 0.5)
        speed = resolve(DlmConfig(), {"dlm_preset": "speed"}, defaults).params
        assert (speed.mask_threshold, speed.edit_threshold) == (0.5, 0.0)


def test_llada2_2_without_the_tokens_that_edit(read):
    """By name alone it is no LLaDA2.2; by its tokens it is, whatever the name."""
    fields = {k: v for k, v in LLADA2_2.items() if k not in EDIT_TOKEN_FIELDS}
    assert read(fields, "LLaDA2.2-mini").dlm_strategy == "threshold"
    config = read(LLADA2_2, "mine")
    assert config.dlm_strategy == "levenshtein"
    config.update({"expert_capacity": 0})
    assert (config.n_group, config.topk_group) == (8, 4)


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
    config.update({"dlm_class": "block"})
    check_declarations(config)


@pytest.mark.parametrize(
    ("declared", "attention"),
    [("full", "full"), ("B", "block"), ("block", "block"), ("C", "causal")],
)
def test_attention_in_words_or_letters(read, declared, attention):
    config = read(A2D_QWEN3 | {"dlm_class": declared}, "renamed")
    check_declarations(config)
    assert ModelDefaults.from_hf_config(config).attention == attention


@pytest.mark.parametrize(
    ("released", "fields", "message"),
    [
        (SDAR, {"use_regular_causal": True}, "use_regular_causal"),
        (LLADA, {"include_qkv_bias": True}, "include_qkv_bias"),
        (LLADA_MOE, {"shared_expert_intermediate_size": 512}, "shared_expert"),
        (LLADA_MOE, {"moe_router_enable_expert_bias": True}, "expert_bias"),
        (LLADA_MOE, {"moe_layer_freq": [0] + [1] * 15}, "moe_layer_freq"),
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
        (LLADA2, {"delete_token_id": 5}, "delete_token_id 5, and not the other"),
        (LLADA2_2, {"split_token_id": 10**6}, "not both inside the vocabulary"),
        (LLADA2_2, {"split_token_id": 156930}, "not two ids besides mask_token_id"),
        (DREAM, {"expand_token_id": 10**6}, "expand_token_id 1000000 is outside"),
        (
            A2D_QWEN3
            | {"architectures": ["A2DLlamaLMHeadModel"], "model_type": "a2d-llama"},
            {"dlm_class": "full"},
            "mask_token_id is not known",
        ),
    ],
)
def test_impossible_declarations_are_refused(read, released, fields, message):
    with pytest.raises(ValueError, match=f"{message}.*--hf-overrides"):
        check_declarations(read(released | fields))


def test_every_alias_can_be_declared():
    for alias in aliases.ALIASES.values():
        if not alias.family.is_diffusion:
            continue
        config_class = load(HF_CONFIGS[alias.family.model_type])
        config = config_class.from_dict(
            {"architectures": [alias.family.architecture]}, name_or_path=alias.target
        )
        check_declarations(config)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_mixin_comes_first(architecture):
    from vllm_dlm.model_executor.models.diffusion import DiffusionModelMixin

    model_class = load(ARCHITECTURES[architecture])
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


def test_another_llama_is_what_it_is_without_us(read):
    """Read by vLLM, copied, and made as the text model of another config."""
    from transformers import AutoConfig, LlamaConfig

    fields = STABLE_DIFFCODER | {"architectures": ["LlamaForCausalLM"]}
    fields = {name: fields[name] for name in fields if name != "auto_map"}
    config = read(fields)
    assert type(config) is LlamaConfig
    assert config.to_dict() == LlamaConfig.from_dict(fields).to_dict() | {
        "_name_or_path": config.to_dict().get("_name_or_path")
    }
    text_config = AutoConfig.for_model(**fields)
    assert type(text_config) is LlamaConfig
    assert not hasattr(text_config, "canvas_length")


def test_a_stable_diffcoder_is_copied(read):
    config = read(STABLE_DIFFCODER)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(other) is type(config)
        assert other.to_dict() == config.to_dict()
    assert "dlm_class" in config.to_diff_dict()


def test_dream_reasoner_is_told_apart(read):
    from vllm_dlm.model_executor.models.dream_config import DreamConfig
    from vllm_dlm.model_executor.models.dream_reasoner_config import DreamReasonerConfig

    assert type(read(DREAM_REASONER, "DreamReasoner-8B")) is DreamReasonerConfig
    assert type(read(DREAM, "Dream-v0-Instruct-7B")) is DreamConfig
    shorter = read(DREAM_REASONER | {"block_size": 16}, "shorter")
    assert shorter.dlm_block_length == 16
