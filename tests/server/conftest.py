# SPDX-License-Identifier: Apache-2.0
"""One `vllm serve` process of `llada-tiny`, for most of the tests here.

`VLLM_DLM_TEST_SERVER=http://...` lets them ask a server that runs already, started as
`launch.COMMAND`: a start takes longer than most of the tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from server.launch import (
    COMMAND,
    MODEL,
    SIZES,
    VLLM,
    Server,
    running_server,
    tail,
)
from tokenizers import Tokenizer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that all tests share."""
    url = os.environ.get("VLLM_DLM_TEST_SERVER")
    if url is not None:
        yield Server(url)
        return
    folder = tmp_path_factory.mktemp("server")
    command = [*COMMAND, "--dlm-filter-dir", str(folder / "filters")]
    with running_server(command, folder / "log") as running:
        yield running


@pytest.fixture(scope="session")
def byte_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of random weights with the 256 bytes for tokens: it spells JSON."""
    from byte_model import write_byte_model

    folder = write_byte_model(tmp_path_factory.mktemp("model") / "LLaDA-bytes")
    command = [
        *(VLLM, "serve", str(folder), "--dlm-strategy", "threshold", *SIZES),
        *("--dlm-block-length", "32"),
        # Pages for a few texts, which take more of them with each canvas.
        *("--max-model-len", "512", "--dlm-max-canvas", "64"),
        *("--num-gpu-blocks-override", "20"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ]
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(command, log, model=str(folder)) as running:
        yield running


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The served model's tokenizer."""
    from vllm_dlm.config.aliases import local_folder

    return Tokenizer.from_file(f"{local_folder(MODEL)}/tokenizer.json")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function, call: Any) -> Any:
    """Show the end of the server's log with a test that failed."""
    report = yield
    if report.failed:
        for value in item.funcargs.values():
            if isinstance(value, Server) and value.log is not None:
                report.sections.append(("the server's log", tail(value.log)))
    return report
