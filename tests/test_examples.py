# SPDX-License-Identifier: Apache-2.0
"""The examples run as they are, and stay short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_short(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40


@pytest.mark.slow
def test_offline():
    # As a user runs it: with vLLM's own processes, not this session's settings.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "VLLM_ENABLE_V1_MULTIPROCESSING"
    }
    (path,) = (path for path in EXAMPLES if path.stem == "offline")
    done = subprocess.run(
        [sys.executable, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Reverse [Ada, Ben, Carl] -> [Carl, Ben, Ada]" in done.stdout
    # Three strategies in one batch: each answered, and each said what it took.
    for prompt in ("Sort [Eva, Dan, Ada]", "Add 27+15"):
        assert f"{prompt} -> " in done.stdout
    assert done.stdout.count(" forwards)") == 3
