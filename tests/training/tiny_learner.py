# SPDX-License-Identifier: Apache-2.0
"""Random networks of 2 layers and 128 tokens, as folders and as learners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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
