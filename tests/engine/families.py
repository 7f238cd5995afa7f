# SPDX-License-Identifier: Apache-2.0
"""The families that are served here: a random checkpoint of each, and its engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.harness import Engine
from reference.checkpoints import write_checkpoint
from reference.network import TinyModel


@dataclass(frozen=True)
class Served:
    """One checkpoint and how it is served."""

    family: str
    folder: str
    """Its name says what the released repository's name says."""
    block: int
    """Block length that is served: the family's own, unless `dlm` sets it."""
    shift: int = 0
    dlm: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    """Entries of config.json."""


BLOCK_CAUSAL = (
    Served("sdar", "SDAR-4B-Chat", 4),
    Served("sdar", "SDAR-4B-Chat-b16", 16, changes={"head_dim": 64}),
    Served("sdar_moe", "SDAR-30B-A3B-Chat-b8", 8),
    Served("llada2", "LLaDA2.0-mini", 32),
    Served("llada2", "LLaDA2.1-mini", 16, dlm={"block_length": 16}),
    Served("fast_dllm_v2", "Fast_dLLM_v2_7B", 32, shift=1),
    Served(
        "fast_dllm_v2",
        "Fast_dLLM_v2_1.5B",
        16,
        shift=1,
        dlm={"block_length": 16},
        changes={"tie_word_embeddings": True, "head_dim": 128},
    ),
    Served("a2d_qwen3", "Qwen3-0.6B-diffusion-bd3lm-v0.1", 32),
    Served(
        "a2d_qwen2",
        "Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm-v0.1",
        8,
        dlm={"block_length": 8},
    ),
    Served("llada2_2", "LLaDA2.2-mini", 8),
    Served("dream_reasoner", "DreamReasoner-8B", 16, changes={"block_size": 16}),
    Served("stable_diffcoder", "Stable-DiffCoder-8B-Instruct", 4),
)
CAUSAL_CONTEXT = (
    Served("nemotron", "Nemotron-Labs-Diffusion-3B", 32),
    Served(
        "nemotron",
        "Nemotron-Labs-Diffusion-8B",
        8,
        changes={"block_size": 8, "head_dim": 64},
    ),
)
REUSES_BLOCKS = BLOCK_CAUSAL + CAUSAL_CONTEXT
FULL_ATTENTION = (
    Served("llada_moe", "LLaDA-MoE-7B-A1B-Instruct", 32),
    Served("dream", "Dream-v0-Instruct-7B", 32, shift=1),
    Served("a2d_qwen3", "Qwen3-0.6B-diffusion-mdlm-v0.1", 32),
    Served("a2d_llama", "Llama-diffusion-mdlm-v0.1", 32),
    Served("rnd1", "RND1-Base-0910", 32, shift=1),
)


def names(served: tuple[Served, ...]) -> list[str]:
    return [one.folder for one in served]


Serve = Callable[..., tuple[Engine, TinyModel]]


def serving(engines: Callable[..., Engine], parent: Path) -> Serve:
    """`serve(served, **options)`: its engine and its oracle.

    Args:
        parent: where the checkpoints go, or are already.
    """

    def start(served: Served, **options: Any) -> tuple[Engine, TinyModel]:
        folder = parent / served.folder
        if not folder.exists():
            write_checkpoint(served.family, folder, seed=2, **served.changes)
        engine = engines(served.dlm, model=str(folder), **options)
        return engine, TinyModel.from_folder(folder)

    return start
