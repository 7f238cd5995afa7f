# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` before anything starts: wrong flags, and the help for them."""

from __future__ import annotations

import subprocess

import pytest
from server.launch import MODEL, START_SECONDS, VLLM

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


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [VLLM, "serve", MODEL, *arguments],
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )


FAST = ("unknown strategy",)
"""Importing takes every run ten seconds; the parsers have tests without a process."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in CASES
    ],
)
def test_a_wrong_flag_is_one_clear_message(name: str):
    arguments, fragments = CASES[name]
    ended = run(arguments)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stdout + ended.stderr
    [message] = [line for line in ended.stderr.splitlines() if "error:" in line]
    assert message.startswith("vllm serve: error: ")
    assert not [part for part in fragments if part not in message], message


@pytest.mark.slow
def test_help_shows_the_flags():
    shown = run(["--help=DlmConfig"])
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
