# SPDX-License-Identifier: Apache-2.0
"""Random networks of 2 layers and 128 tokens, as folders and as learners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vllm_dlm.files.model_folders import read_weights
from vllm_dlm.tasks import tokenizer
from vllm_dlm.training.block_causal import export_block_causal, make_block_causal
from vllm_dlm.training.learner import Learner, load_learner
from vllm_dlm.training.tiny.export import export
from vllm_dlm.training.tiny.llada_modeling import LLaDAModel, LLaDAShape

SHAPE = LLaDAShape(
    vocab_size=tokenizer.VOCAB_SIZE,
    d_model=32,
    n_layers=2,
    n_heads=2,
    mlp_hidden_size=48,
    max_sequence_length=128,
)


def tiny_folder(folder: Path, layout: str = "llada", block_length: int = 4) -> Path:
    """Write a random network with llada-tiny's tokenizer; `layout` llada or sdar."""
    torch.manual_seed(0)
    if layout == "llada":
        export(LLaDAModel(SHAPE), folder)
    else:
        export_block_causal(make_block_causal(SHAPE, block_length), folder)
    return folder


def tiny_learner(folder: Path, layout: str = "llada", **options: Any) -> Learner:
    """The network of `tiny_folder`, loaded with the options of `load_learner`."""
    return load_learner(tiny_folder(folder, layout), **options)


def train_command(recipe: str, folder: Path, output: Path, *more: str) -> list[str]:
    """A few small steps of a recipe, nothing measured but where `more` asks for it."""
    return [
        *("train", recipe, str(folder), "--output-dir", str(output)),
        *("--steps", "4", "--batch-size", "6", "--num-rows", "40"),
        *(() if "--num-problems" in more else ("--num-problems", "0")),
        *more,
    ]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that a training has written, by name."""
    return read_weights(folder / "model.safetensors")


def largest_difference(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]
) -> float:
    """Between tensors of the same name, of all of them."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)
