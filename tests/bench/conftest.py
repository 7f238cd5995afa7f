# SPDX-License-Identifier: Apache-2.0
"""A tiny random model, and the command run on it in this process."""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from vllm_dlm.bench import command

TINY = "random:d=64,layers=2,heads=2,mlp=128,vocab=256"


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """The command sets variables that other tests' engines would read."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`bench(*arguments)`: runs it, one thread, and reads its JSON file."""

    def run(*arguments: str) -> dict[str, Any]:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        path = tmp_path / "results.json"
        always = ("--json", str(path), "--threads", "1", "--dtype", "float32")
        args = parser.parse_args([*always, *arguments])
        assert command.run(args) == 0
        return json.loads(path.read_text())

    return run
