# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` before anything starts: wrong flags, and the help for them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from server.launch import MODEL, START_SECONDS, VLLM

Run = subprocess.CompletedProcess[str]

# id: (arguments, what the message must hold)
CASES: dict[str, tuple[list[str], list[str]]] = {
    "unknown strategy": (
        ["--dlm-strategy", "nope"],
        ["--dlm-strategy", "'nope'", "static", "threshold", "factor", "learn2pd"],
    ),
    "bad JSON": (
        ["--dlm-strategy-config", "{"],
        ["--dlm-strategy-config", "not valid JSON"],
    ),
    "unknown cache": (
        ["--dlm-cache", "most"],
        ["--dlm-cache", "'vicinity' or 'window'", "'most'"],
    ),
    "parameter of another strategy": (
        ["--dlm-strategy", "factor", "--dlm-strategy-config.threshold", "0.5"],
        ["'factor'", "'threshold'", "Valid: factor"],
    ),
    "speculative method": (
        ["--speculative-config", '{"method": "aded", "windw": 3}'],
        ["'aded'", "unknown option 'windw'", "Did you mean 'window'?"],
    ),
}
HELP = ["--help=DlmConfig"]


@pytest.fixture(scope="module")
def runs() -> Callable[[list[str]], Run]:
    """`runs(arguments)`: how `vllm serve` ended; two at a time, importing is slow."""
    with ThreadPoolExecutor(2) as pool:
        arguments = [arguments for arguments, _ in CASES.values()] + [HELP]
        started: dict[str, Future[Run]] = {
            repr(items): pool.submit(run, items) for items in arguments
        }
    return lambda items: started[repr(items)].result()


def run(arguments: list[str]) -> Run:
    return subprocess.run(
        [VLLM, "serve", MODEL, *arguments],
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_flag_is_one_clear_message(runs: Callable[[list[str]], Run], name: str):
    arguments, fragments = CASES[name]
    ended = runs(arguments)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stdout + ended.stderr
    [message] = [line for line in ended.stderr.splitlines() if "error:" in line]
    assert message.startswith("vllm serve: error: ")
    assert not [part for part in fragments if part not in message], message


def test_help_shows_the_flags(runs: Callable[[list[str]], Run]):
    shown = runs(HELP)
    assert shown.returncode == 0
    flags = ["strategy NAME", "strategy-config JSON", "block-length", "steps"]
    flags += [
        "cache {none,prefix,dual,vicinity,window}",
        "max-canvas",
        "online-learning",
    ]
    assert not [flag for flag in flags if f"--dlm-{flag}" not in shown.stdout]
    # The group alone: no flag of vLLM's own.
    assert "--max-model-len" not in shown.stdout
