# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and page sizes that no server can start with: the message says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reference.checkpoints import write_checkpoint

from vllm_dlm.admission.sampling_params import validate_sampling_params

pytestmark = pytest.mark.usefixtures("no_retries")

CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], list[str]]] = {
    # id: (family, folder, entries of config.json, arguments, what the message holds)
    "pages of half a block": (
        "sdar",
        "SDAR-4B-Chat-b64",
        {},
        {"block_size": 32},
        ["--block-size 32", "multiple", "block length 64", "set --block-size 64"],
    ),
    "mask token": (
        "a2d_llama",
        "Llama-diffusion-mdlm",
        {"mask_token_id": None},
        {},
        ["mask_token_id is not known", "--hf-overrides"],
    ),
    "mask token outside": (
        "sdar",
        "SDAR-4B-Chat",
        {"mask_token_id": 128},
        {},
        ["mask_token_id 128 is outside the vocabulary of 128", "--hf-overrides"],
    ),
    "no end of text": (
        "fast_dllm_v2",
        "Fast_dLLM_v2_7B",
        {"eos_token_id": None},
        {},
        ["no token ends a text", "generation_config.json", "--hf-overrides"],
    ),
    "half a block at a time": (
        "llada2",
        "LLaDA2.0-mini",
        {},
        {"max_num_batched_tokens": 48, "max_num_seqs": 4},
        ["max_num_batched_tokens 48", "two blocks of 32", "at least 64"],
    ),
    "neither mdlm nor bd3lm": (
        "a2d_qwen3",
        "my-checkpoint",
        {},
        {},
        ["dlm_class", "checkpoint's name", "--hf-overrides"],
    ),
    "a causal prompt": (
        "sdar",
        "SDAR-4B-Chat",
        {"use_regular_causal": True},
        {},
        ["use_regular_causal in the SDAR config is true", "has to be false"],
    ),
    "two ranks share a prompt": (
        "sdar",
        "SDAR-4B-Chat",
        {},
        {"prefill_context_parallel_size": 2},
        ["prefill context parallelism", "--tensor-parallel-size"],
    ),
    "pages that leave": (
        "dream",
        "Dream-v0-Instruct-7B",
        {},
        {"kv_offloading_size": 1},
        ["--kv-offloading-size", "remove it"],
    ),
    "embeddings for a prompt": (
        "dream",
        "Dream-v0-Instruct-7B",
        {},
        {"enable_prompt_embeds": True},
        ["--enable-prompt-embeds", "remove it"],
    ),
    "a text that is pooled": (
        "dream",
        "Dream-v0-Instruct-7B",
        {},
        {"convert": "embed"},
        ["--runner pooling and --convert", "remove them"],
    ),
    "a strategy beside approximate KV": (
        "dream",
        "Dream-v0-Instruct-7B",
        {},
        {"additional_config": {"dlm": {"strategy": "freedave", "cache": "window"}}},
        ["'freedave'", "set cache to 'none' or 'prefix' or 'dual'"],
    ),
    "a penalty": (
        "dream",
        "Dream-v0-Instruct-7B",
        {},
        {"override_generation_config": {"repetition_penalty": 1.2}},
        ["repetition_penalty", "--override-generation-config"],
    ),
    "a canvas of no number": (
        "dream",
        "Dream-v0-Instruct-7B",
        {"dlm_max_canvas": "x"},
        {},
        ["dlm_max_canvas in the Dream config is 'x'", "a positive whole number"],
    ),
    "an override of no number": (
        "llada2",
        "LLaDA2.0-mini",
        {},
        {"hf_overrides": {"eos_token_id": "x"}},
        ["eos_token_id in the LLaDA2 config is 'x'", "a list of token ids"],
    ),
    "an override of a number by an object": (
        "sdar",
        "SDAR-4B-Chat",
        {},
        {"hf_overrides": {"hidden_size": {"a": 1}}},
        ["hidden_size in the SDAR config is {'a': 1}", "a positive whole number"],
    ),
    "an override of RoPE": (
        "llada_moe",
        "LLaDA-MoE-7B-A1B-Instruct",
        {},
        {"hf_overrides": {"rope_scaling": {"type": "dynamic", "factor": 2}}},
        ["'dynamic'", "default, linear, llama3, yarn"],
    ),
    "a strategy of no such parameter": (
        "sdar",
        "SDAR-4B-Chat",
        {"dlm_strategy_config": {"threshold": "x"}},
        {},
        ["threshold", "'x'"],
    ),
    "edits of a model without tokens for them": (
        "sdar",
        "SDAR-4B-Chat",
        {
            "dlm_strategy": "levenshtein",
            "dlm_strategy_config": {"edit_threshold": 0.5},
        },
        {},
        ["'levenshtein'", "no delete_token_id and split_token_id", "'joint'"],
    ),
    "a strategy that does not exist": (
        "sdar",
        "SDAR-4B-Chat",
        {"dlm_strategy": "x"},
        {},
        ["'x'", "threshold"],
    ),
}


def write(family: str, folder: Path, changes: dict[str, Any]) -> Path:
    """A checkpoint whose config.json says something else than its weights."""
    file = write_checkpoint(family, folder, seed=0) / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_server_that_cannot_start_says_why(tmp_path: Path, name: str):
    from vllm.engine.arg_utils import EngineArgs

    family, folder_name, changes, arguments, fragments = CASES[name]
    folder = write(family, tmp_path / folder_name, changes)
    with pytest.raises(ValueError) as caught:
        EngineArgs(str(folder), dtype="float32", **arguments).create_engine_config()
    message = str(caught.value)
    assert not [part for part in fragments if part not in message], message


@pytest.mark.parametrize("value", ["x", 1.5, [1, "x"], True, {"a": 1}])
def test_an_end_of_text_of_no_number(tmp_path: Path, value: Any):
    """In generation_config.json, of which it is read."""
    from vllm.engine.arg_utils import EngineArgs

    folder = write("sdar", tmp_path / "SDAR-4B-Chat", {})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=r"eos_token_id in generation_config\.json is"):
        EngineArgs(str(folder), dtype="float32").create_engine_config()


def test_ends_of_text_outside_the_vocabulary_are_left_out(tmp_path: Path, caplog):
    """A family's own ids, an override, generation_config.json: one warning for all."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_dlm.config.model import ModelDefaults
    from vllm_dlm.model_executor import generation_config

    folder = write("sdar", tmp_path / "SDAR-4B-Chat", {})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 777}))
    overrides = {"dlm_stop_ids": [4, 128, -3], "eos_token_id": [5, 999]}
    generation_config.logger.addHandler(caplog.handler)
    try:
        config = EngineArgs(
            str(folder), dtype="float32", hf_overrides=overrides
        ).create_engine_config()
    finally:
        generation_config.logger.removeHandler(caplog.handler)
    hf_config = config.model_config.hf_config
    assert ModelDefaults.from_hf_config(hf_config).stop_ids == (4, 5)
    warnings = {r.getMessage() for r in caplog.records if "outside" in r.getMessage()}
    (warning,) = warnings
    assert "-3, 128, 777, 999" in warning


def test_an_override_is_read_as_config_json_is(tmp_path: Path):
    from vllm.engine.arg_utils import EngineArgs

    folder = write("llada2", tmp_path / "LLaDA2.0-mini", {})
    overrides = {
        "dlm_strategy_config": {"threshold": 0.5},
        "rope_scaling": {"type": "yarn", "factor": 4.0},
        "block_size": 16,
    }
    config = EngineArgs(
        str(folder), dtype="float32", hf_overrides=overrides
    ).create_engine_config()
    assert config.model_config.hf_config.rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 600000.0,
        "partial_rotary_factor": 0.5,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    }
    assert config.model_config.hf_config.dlm_strategy_config == {"threshold": 0.5}


@pytest.mark.parametrize(("asked", "served"), [(None, 8192), (16384, 16384)])
def test_the_context_of_full_attention_is_what_one_forward_holds(
    tmp_path: Path, asked: int | None, served: int
):
    """Dream's config says 131072, of which a forward of full attention computes all."""
    from vllm.engine.arg_utils import EngineArgs

    changes = {"max_position_embeddings": 131072}
    folder = write("dream", tmp_path / "Dream-v0-Instruct-7B", changes)
    config = EngineArgs(str(folder), max_model_len=asked).create_engine_config()
    assert config.model_config.max_model_len == served
    assert config.scheduler_config.max_num_batched_tokens == served


def test_a_penalty_of_the_model_it_was_made_from_is_left_out(tmp_path: Path):
    """Or every request that sets none would be refused."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams

    folder = write("dream", tmp_path / "Dream-v0-Instruct-7B", {})
    inherited = {"repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8}
    (folder / "generation_config.json").write_text(json.dumps(inherited))
    model_config = EngineArgs(str(folder)).create_engine_config().model_config
    defaults = model_config.get_diff_sampling_param()
    assert defaults == {"repetition_penalty": 1.0, "temperature": 0.0, "top_p": 0.8}
    validate_sampling_params(SamplingParams(**defaults), model_config)
