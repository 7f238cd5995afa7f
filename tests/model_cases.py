# SPDX-License-Identifier: Apache-2.0
"""A tiny checkpoint of every family, and its loading without an engine."""

from pathlib import Path

from reference.checkpoints import write_checkpoint
from reference.families import FAMILIES
from reference.llada import write_random_checkpoint

NAMES = {
    "llada": "LLaDA-8B",
    "a2d_qwen3": "Qwen3-0.6B-diffusion-mdlm-v0.1",
    "a2d_qwen2": "Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm-v0.1",
    "a2d_llama": "Llama-diffusion-mdlm-v0.1",
}
ALL = ["llada", *FAMILIES]


def write(family: str, folder: Path, **changes) -> Path:
    folder = folder / NAMES.get(family, family)
    if family == "llada":
        return write_random_checkpoint(folder, seed=1, **changes)
    return write_checkpoint(family, folder, seed=1, **changes)


def load(model, tensors) -> None:
    model._is_loaded = False
    model.load_weights(tensors.items())
