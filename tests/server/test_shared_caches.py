# SPDX-License-Identifier: Apache-2.0
"""Two servers that start at once, and compile into the same empty folders."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from server.launch import COMMAND, Server, running_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

QUESTIONS: list[dict[str, Any]] = [
    {"max_tokens": 64, "ignore_eos": True, "vllm_xargs": {"dlm_strategy": strategy}}
    for strategy in ("static", "threshold", "klass", "entropy")
] + [
    {"max_tokens": 32, "temperature": 0.8, "seed": 3, "top_k": 5},
    {"max_tokens": 24, "structured_outputs": {"regex": r"\[[A-Z][a-z]+\]"}},
]


def answers(server: Server) -> list[str]:
    return [server.text(**asked) for asked in QUESTIONS]


def test_both_answer_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """numba's code, torch.compile's, vLLM's and learned filters; then once more from
    what is there."""
    for name in ("XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    # Compiled, and with the filter folder of `XDG_CACHE_HOME`.
    command = [word for word in COMMAND if word != "--enforce-eager"]

    def start(stack: ExitStack, number: str) -> Server:
        return stack.enter_context(running_server(command, tmp_path / number))

    found = []
    for round in ("cold", "warm"):
        with ExitStack() as first, ExitStack() as second, ThreadPoolExecutor(2) as pool:
            starting = [
                pool.submit(start, stack, f"{round}{number}")
                for number, stack in enumerate((first, second))
            ]
            servers = [one.result() for one in starting]
            found += list(pool.map(answers, servers))
    assert all(found[0])
    assert found == [found[0]] * 4
    assert list((tmp_path / "numba").rglob("*.nbi"))
