# SPDX-License-Identifier: Apache-2.0
"""`vllm-dlm chat MODEL` with an engine of its own; with a server: `tests/server`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

VLLM_DLM = str(Path(sys.executable).with_name("vllm-dlm"))


@pytest.mark.slow
def test_questions_from_a_pipe_are_answered_line_by_line():
    """As a user's shell starts it: the engine is a process of its own."""
    environment = dict(os.environ)
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    asked = "Sort [Eva, Dan, Ada]\n\nReverse [Ada, Ben, Carl]\n"
    ended = subprocess.run(
        [VLLM_DLM, "chat", "llada-tiny", "--max-tokens", "40", "--strategy", "eb"],
        input=asked,
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    first, second = ended.stdout.splitlines()
    assert first == "[Ada, Dan, Eva]"
    assert second
    assert "Traceback" not in ended.stderr
