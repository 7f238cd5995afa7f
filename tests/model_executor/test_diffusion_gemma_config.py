# SPDX-License-Identifier: Apache-2.0
"""How DiffusionGemma comes into our engine, and what is refused at start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reference.diffusion_gemma import write_random_checkpoint

CANVAS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusion-gemma")
    return write_random_checkpoint(folder, seed=0, canvas_length=CANVAS)


def configured(model: Path | str, dlm: dict[str, Any], **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_dlm.plugin import register

    register()
    return EngineArgs(
        str(model), additional_config={"dlm": dlm}, skip_tokenizer_init=True, **options
    ).create_engine_config()


def test_the_text_model_of_a_released_config_is_served(folder):
    asked = {"diffusion_gemma": "engine"}
    config = configured(folder, asked, hf_overrides={"dlm_max_canvas": 64})
    model = config.model_config
    assert model.architectures == ["DlmDiffusionGemma"]
    assert not model.is_multimodal_model and model.is_diffusion
    served = model.hf_config
    assert served.dlm_class == "causal" and served.dlm_noise == "uniform"
    assert served.dlm_block_length == CANVAS and served.canvas_length == 64
    # As in the checkpoint's generation_config.json.
    assert served.dlm_strategy_config == {
        "entropy_bound": 0.1,
        "t_min": 0.4,
        "t_max": 0.8,
        "max_denoising_steps": 6,
        "stability": 1,
        "confidence": 0.005,
    }
    assert model.override_generation_config["temperature"] == 1.0
    # What vLLM's own code is given, it gives to nobody else.
    from vllm import ModelRegistry

    own = ModelRegistry.models["DiffusionGemmaForBlockDiffusion"]
    assert own.module_name == "vllm.model_executor.models.diffusion_gemma"


@pytest.mark.parametrize(
    ("dlm", "options", "says"),
    [
        ({"block_length": 32}, {}, "is not this model's canvas of 16 tokens"),
        ({"strategy": "threshold"}, {}, "replaces random tokens. It serves: renoise"),
        ({"eotp": "block"}, {}, "eotp is for models with a mask"),
        ({"record_traces": True}, {}, "record_traces is for models with a mask"),
        ({"trajectory_dir": "."}, {}, "trajectory_dir is for models with a mask"),
        ({}, {"pipeline_parallel_size": 2}, "pipeline parallelism is not supported"),
        ({}, {"hf_overrides": lambda config: config}, "must be a mapping"),
    ],
)
def test_what_it_cannot_do_is_refused(folder, dlm, options, says):
    with pytest.raises(ValueError, match=says):
        configured(folder, {"diffusion_gemma": "engine", **dlm}, **options)


@pytest.mark.parametrize("value", ["native", "stock", "engine"])
def test_the_option_is_for_this_model_alone(value):
    for model in ("llada", "llama"):
        folder = Path(__file__).parents[2] / f"vllm_dlm/assets/{model}-tiny"
        with pytest.raises(ValueError, match="diffusion_gemma is for DiffusionGemma"):
            configured(folder, {"diffusion_gemma": value})


def test_a_checkpoint_without_its_sampler_is_refused(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    path = tmp_path / "generation_config.json"
    said = json.loads(path.read_text())
    del said["sampler_config"]
    path.unlink()
    path.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"no sampler_config\.entropy_bound"):
        configured(tmp_path, {"diffusion_gemma": "engine"})
