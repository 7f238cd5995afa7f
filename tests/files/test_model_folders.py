# SPDX-License-Identifier: Apache-2.0
"""Folders of models, as our own loops read them: sizes and weights."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from files.file_kinds import EVERYWHERE, WHOLE

from vllm_dlm.files.whole_files import (
    write_json,
)
from vllm_dlm.model_executor.model_key import weights_digest
from vllm_dlm.training.drafters.networks import load_drafter
from vllm_dlm.training.tiny.export import export
from vllm_dlm.training.tiny.llada_modeling import LLaDAModel, LLaDAShape, load_llada
from vllm_dlm.training.tiny.llama_modeling import LlamaModel, export_llama, load_llama

SHAPE = LLaDAShape(vocab_size=11, d_model=8, n_layers=2, n_heads=2, mlp_hidden_size=8)


# Opening a pipe, or counting to 99999999, would take for ever.
pytestmark = pytest.mark.timeout(120)


# Folders of models ----------------------------------------------------------------


def write_model(folder: Path, layout: str) -> Callable[[Path], Any]:
    if layout == "llada":
        export(LLaDAModel(SHAPE), folder)
        return load_llada
    export_llama(LlamaModel(SHAPE), folder)
    return load_llama


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", None),
        ("vocab_size", "11"),
        ("vocab_size", 12),
        ("vocab_size", 10**18),
        ("n_layers", 10**9),
        ("n_layers", 3),
        ("n_layers", -1),
        ("n_layers", True),
        ("d_model", 16.5),
        ("rope_theta", "inf"),
        ("rms_norm_eps", 0),
    ],
)
@pytest.mark.parametrize("layout", ["llada", "llama"])
def test_sizes_of_a_models_folder(
    layout: str, field: str, value: Any, tmp_path: Path
) -> None:
    read = write_model(tmp_path, layout)
    read(tmp_path)
    names = {"n_layers": "num_hidden_layers", "d_model": "hidden_size"}
    name = names.get(field, field) if layout == "llama" else field
    config = json.loads((tmp_path / "config.json").read_text())
    assert name in config
    write_json(tmp_path / "config.json", {**config, name: value})
    with pytest.raises(ValueError, match=str(tmp_path)):
        read(tmp_path)


@pytest.mark.parametrize("damage", [*EVERYWHERE, *WHOLE])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_files_of_a_models_folder(file: str, damage: Any, tmp_path: Path) -> None:
    read = write_model(tmp_path, "llada")
    damage(tmp_path / file)
    for load in (read, load_drafter):
        with pytest.raises(ValueError, match=str(tmp_path)):
            load(tmp_path)


def test_a_model_key_of_a_folder_with_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="it is a pipe"):
        weights_digest(tmp_path)
