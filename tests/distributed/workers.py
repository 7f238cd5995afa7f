# SPDX-License-Identifier: Apache-2.0
"""Engines of several workers, and the workers of those that the tests have started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
from engine.harness import Engine

_TITLES = {"mp": "VLLM::Worker", "ray": "ray::RayWorkerProc"}


def youngest_workers(backend: str, number: int) -> list[psutil.Process]:
    """The workers that were started last.

    Args:
        backend: "mp" or "ray"; a Ray cluster must be one that this process started.
    """
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            title = " ".join(child.cmdline())
        except psutil.Error:  # gone since, or a zombie
            continue
        if _TITLES[backend] in title:
            found.append(child)
    assert len(found) >= number, found
    return sorted(found, key=lambda process: process.create_time())[-number:]


def start_engine(model: Path, dlm: dict[str, Any], **options: Any) -> Engine:
    """An engine for 8 requests in float32; options are those of vLLM's engine."""
    from vllm import LLM

    llm = LLM(
        str(model),
        additional_config={"dlm": {"online_learning": False} | dlm},
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        block_size=32,
        num_gpu_blocks_override=80,
        **options,
    )
    return Engine(llm)
