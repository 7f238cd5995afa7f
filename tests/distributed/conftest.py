# SPDX-License-Identifier: Apache-2.0
"""Engines of several workers: processes, or actors of a Ray cluster on this machine.

Each start takes half a minute, so whole files share a cluster and an engine. The
checkpoints' vocabulary, 150, does not fill its two halves: one ends in padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.workers import start_engine
from engine.harness import Engine
from engine.model_files import write_filters
from reference.checkpoints import write_checkpoint
from reference.llada import write_random_checkpoint
from vllm import envs

VOCABULARY = 150


@pytest.fixture(scope="module", autouse=True)
def users_environment() -> Iterator[None]:
    """Engines in processes of their own, as users have them; workers do not pin cores.

    By default a vLLM worker takes a NUMA node for itself, and a small machine has one.
    """
    torch.set_num_threads(1)
    # vLLM has kept what the variables were when this process' last engine started.
    envs.disable_envs_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        # A test has workers call a function of its own.
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        # No token file in the user's home: the cluster is on this machine, for a test.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster on this machine, with four devices; processes join it."""
    import ray

    from vllm_dlm.ray_cluster import connect

    with pytest.MonkeyPatch.context() as patch:
        # `connect` sets it; afterwards it is what it was.
        patch.setenv("RAY_ADDRESS", "auto")
        connect(devices=4)
        yield
        ray.shutdown()


@pytest.fixture(scope="module", params=["mp", "ray"])
def backend(request: pytest.FixtureRequest) -> str:
    """How workers are started: as processes, or as actors of `cluster`."""
    if request.param == "ray":
        request.getfixturevalue("cluster")
    return request.param


@pytest.fixture(scope="session")
def llada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with full attention, and Learn2PD filters."""
    folder = write_random_checkpoint(
        tmp_path_factory.mktemp("llada"), seed=2, vocab_size=VOCABULARY
    )
    write_filters(folder)
    return folder


@pytest.fixture(scope="session")
def sdar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with block attention, blocks of 16."""
    folder = tmp_path_factory.mktemp("sdar") / "SDAR-4B-Chat-b16"
    return write_checkpoint("sdar", folder, seed=2, vocab_size=VOCABULARY)


@pytest.fixture(scope="session")
def llada2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with block attention and experts."""
    folder = tmp_path_factory.mktemp("llada2") / "LLaDA2.0-mini"
    return write_checkpoint("llada2", folder, seed=2, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def engines() -> Iterator[Callable[..., Engine]]:
    """`engines(model, backend, degree, **options)`: an engine, started once a file."""
    started: dict[tuple[Any, ...], Engine] = {}

    def engine(model: Path, backend: str, degree: int, **options: Any) -> Engine:
        key = (model, backend, degree, *options.items())
        if key not in started:
            started[key] = start_engine(
                model,
                options,
                tensor_parallel_size=degree,
                distributed_executor_backend=backend,
            )
        return started[key]

    yield engine
    for running in started.values():
        running.llm.llm_engine.engine_core.shutdown()
