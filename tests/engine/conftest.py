# SPDX-License-Identifier: Apache-2.0
"""Tiny random LLaDA checkpoints and engines that serve them, shared by all tests here.

An engine start costs more than most tests: all tests but those about lengths and
memory use one engine, and set what they need per request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.harness import Engine, end
from engine.model_files import write_filters, write_frequencies
from reference.llada import TinyLLaDA, write_random_checkpoint


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Seed 2 produces an EOS now and then, early ones too.
    folder = write_random_checkpoint(tmp_path_factory.mktemp("llada"), seed=2)
    write_filters(folder)
    write_frequencies(folder)
    return folder


@pytest.fixture(scope="session")
def oracle(checkpoint: Path) -> TinyLLaDA:
    return TinyLLaDA.from_folder(checkpoint)


@pytest.fixture(scope="session")
def engines(checkpoint: Path) -> Iterator[Callable[..., Engine]]:
    """`engines(dlm, **options)`: the engine with these options, started once.

    `model` is a checkpoint's folder; LLaDA's without it.
    """
    started: dict[str, Engine] = {}

    def engine(dlm: dict[str, Any] | None = None, **options: Any) -> Engine:
        from vllm import LLM
        from vllm.distributed.parallel_state import destroy_model_parallel

        # Learning would change decisions while tests run.
        dlm = {"online_learning": False} | (dlm or {})
        options = {
            "model": str(checkpoint),
            "additional_config": {"dlm": dlm},
            "max_model_len": 256,
            "max_num_seqs": 8,
            # Small pages, the smallest that a CPU has, so that blocks begin and end
            # anywhere in them; enough for all 8 requests.
            "block_size": 32,
            "num_gpu_blocks_override": 80,
            "dtype": "float32",
            "enforce_eager": True,
            # For test_weight_updates.py; others do not notice.
            "weight_transfer_config": {"backend": "dlm_safetensors"},
        } | options
        key = repr(sorted(options.items()))
        if key not in started:
            # Groups are made by a process's first engine, and only where that serves
            # a mixture of experts is there one for experts.
            destroy_model_parallel()
            started[key] = Engine(LLM(disable_log_stats=True, **options))
        return started[key]

    yield engine
    end(started)


@pytest.fixture(scope="session")
def engine(engines: Callable[..., Engine]) -> Engine:
    """The engine that most tests share: 8 requests at a time, context 256."""
    return engines()


@pytest.fixture(scope="session")
def small_engine(engines: Callable[..., Engine]) -> Engine:
    """Canvases of at most 32 positions, context 128, pages for three of those."""
    return engines(
        dlm={"max_canvas": 32}, max_model_len=128, num_gpu_blocks_override=13
    )


@pytest.fixture(scope="session")
def wide_engine(engines: Callable[..., Engine]) -> Engine:
    """16 requests at a time."""
    return engines(max_num_seqs=16, num_gpu_blocks_override=160)


@pytest.fixture(scope="session")
def busy_engine(engines: Callable[..., Engine]) -> Engine:
    """Forwards of at most 128 rows; a model with a stop token of its own, 11."""
    return engines(
        dlm={"max_canvas": 32},
        max_model_len=128,
        num_gpu_blocks_override=33,
        max_num_batched_tokens=128,
        hf_overrides={"dlm_stop_ids": [11]},
    )
