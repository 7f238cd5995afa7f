# SPDX-License-Identifier: Apache-2.0
"""One `vllm serve` process for all tests here.

`VLLM_DLM_TEST_SERVER=http://...` lets them ask a server that runs already, started as
`launch.COMMAND`: a start takes longer than most of the tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server.launch import MODEL, Server, running_server, tail
from tokenizers import Tokenizer

_LOG = pytest.StashKey[Path]()


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Server]:
    """The server that all tests share."""
    url = os.environ.get("VLLM_DLM_TEST_SERVER")
    if url is not None:
        yield Server(url)
        return
    log = tmp_path_factory.mktemp("server") / "log"
    request.config.stash[_LOG] = log
    with running_server(log) as running:
        yield running


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The served model's tokenizer."""
    from vllm_dlm.aliases import local_folder

    return Tokenizer.from_file(f"{local_folder(MODEL)}/tokenizer.json")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    """Show the end of the server's log with a test that failed."""
    report = yield
    log = item.config.stash.get(_LOG, None)
    if report.failed and log is not None and "server" in item.fixturenames:
        report.sections.append(("the server's log", tail(log)))
    return report
