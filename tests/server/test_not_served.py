# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and page sizes that no server can start with: the message says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reference.checkpoints import write_checkpoint

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
        ["use_regular_causal", "use a checkpoint without it"],
    ),
    "DreamReasoner": (
        "dream",
        "DreamReasoner-7B",
        {"architectures": ["DreamForCausalLM"]},
        {},
        ["DreamReasoner", "Dream-v0", "are supported"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_server_that_cannot_start_says_why(tmp_path: Path, name: str):
    from vllm.engine.arg_utils import EngineArgs

    family, folder_name, changes, arguments, fragments = CASES[name]
    folder = write_checkpoint(family, tmp_path / folder_name, seed=0)
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(ValueError) as caught:
        EngineArgs(str(folder), dtype="float32", **arguments).create_engine_config()
    message = str(caught.value)
    assert not [part for part in fragments if part not in message], message
