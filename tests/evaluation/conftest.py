# SPDX-License-Identifier: Apache-2.0
"""The command `vllm-dlm eval`, run in this process."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from vllm_dlm.evaluation import command

Evaluate = Callable[..., list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """The command sets variables that other tests' engines would read."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def evaluate(tmp_path: Path) -> Evaluate:
    """`evaluate(*arguments)`: runs the command; the cells of its JSON file."""

    def run(*arguments: str) -> list[dict[str, Any]]:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        path = tmp_path / "results.json"
        always = ("--json", str(path), "--dtype", "float32", "--concurrency", "8")
        args = parser.parse_args(
            [
                *arguments,
                *always,
                # Compiling is of no use to a few requests.
                *("--engine-option", "enforce_eager=true"),
                *("--engine-option", "max_model_len=512"),
            ]
        )
        assert command.run(args) == 0
        return json.loads(path.read_text())["cells"]

    return run
