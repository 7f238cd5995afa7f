# SPDX-License-Identifier: Apache-2.0
"""Two tiny random Llamas; routers and servers over them that all tests share."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from server.launch import Server, running_server
from spec_decode.harness import model_runner
from switching.reference import load, write_llama
from tiers import fast

PROMPT = [40, 9, 20, 33]

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


def make_router(folders: tuple[Path, Path], runner: str, **options: Any) -> Any:
    """A router of the tiny pair, tau 2 bits, on model runner "V1" or "V2"."""
    from vllm.distributed.parallel_state import destroy_model_parallel

    from vllm_dlm.switching.router import EntropyRouter

    destroy_model_parallel()
    options = ENGINE | options
    with model_runner(int(runner[1:])):
        router = EntropyRouter(
            *map(str, folders), tau=2, small_options=options, large_options=options
        )
    for llm in router.llms.values():
        core = llm.llm_engine.engine_core.engine_core
        kind = type(core.model_executor.driver_worker.worker.model_runner)
        # V2 for CPUs lies in a folder of its own.
        assert (".cpu." in kind.__module__) == (runner == "V2")
    return router


@pytest.fixture(scope="session")
def routers(folders: tuple[Path, Path]) -> Iterator[Callable[[str], Any]]:
    """`routers(runner)`: that router, started once; eight texts, context 256."""
    started: dict[str, Any] = {}

    def router(runner: str) -> Any:
        if runner not in started:
            started[runner] = make_router(folders, runner)
        return started[runner]

    yield router
    started.clear()
    gc.collect()


@pytest.fixture(scope="session", params=fast("V1", of=("V1", "V2")))
def router(request: pytest.FixtureRequest, routers: Callable[[str], Any]) -> Any:
    """A router on either model runner; on V2 in the slow tier."""
    return routers(request.param)


@pytest.fixture(scope="session")
def pair(
    folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server of the tiny pair, tau 2, with all that vLLM's environment turns on."""
    with running_pair(folders, tmp_path_factory.mktemp("pair") / "log") as server:
        yield server


@contextmanager
def running_pair(
    folders: tuple[Path, Path], log: Path, **variables: str
) -> Iterator[Server]:
    """See `pair`.

    Args:
        variables: further variables of its environment.
    """
    program = Path(sys.executable).with_name("vllm-dlm")
    http = {
        "uvicorn_log_level": "warning",
        "enable_auto_tool_choice": True,
        "tool_call_parser": "hermes",
    }
    command = [
        *(str(program), "serve-pair", *map(str, folders), "--tau", "2"),
        *("--served-model-name", "pair", "--engine-args", json.dumps(ENGINE)),
        *("--serve-args", json.dumps(http)),
    ]
    with pytest.MonkeyPatch.context() as environment:
        # The last test looks at a server whose engine is gone.
        environment.setenv("VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", "1")
        environment.setenv("VLLM_SERVER_DEV_MODE", "1")
        environment.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
        environment.setenv("OMP_NUM_THREADS", "1")
        for name, value in variables.items():
            environment.setenv(name, value)
        with running_server(command, log, model="pair") as server:
            yield server


def ask(pair: Server, prompt: Any = PROMPT, **options: Any) -> Any:
    """A completion of 40 tokens, whatever they are."""
    return pair.complete(prompt, **{"max_tokens": 40, "ignore_eos": True, **options})
