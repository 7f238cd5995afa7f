# SPDX-License-Identifier: Apache-2.0
"""Two tiny random Llamas, and one router over them that all tests share."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from switching.reference import load, write_llama

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "kv_cache_memory_bytes": 8 << 20,
    "max_num_seqs": 8,
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Checkpoints of the small and the large model."""
    small = write_llama(tmp_path_factory.mktemp("small"), seed=1, layers=1)
    large = write_llama(tmp_path_factory.mktemp("large"), seed=2, layers=2)
    return small, large


@pytest.fixture(scope="session")
def networks(folders: tuple[Path, Path]) -> dict[str, Any]:
    """The reference's networks, in float32."""
    return {name: load(folder) for name, folder in zip("sl", folders, strict=True)}


@pytest.fixture(scope="session")
def router(folders: tuple[Path, Path]) -> Iterator[Any]:
    """tau 2 bits; eight texts at a time, context 256."""
    from vllm.distributed.parallel_state import destroy_model_parallel

    from vllm_dlm.switching.router import EntropyRouter

    destroy_model_parallel()
    small, large = map(str, folders)
    router = EntropyRouter(
        small, large, tau=2, small_options=ENGINE, large_options=ENGINE
    )
    yield router
    del router
    gc.collect()
