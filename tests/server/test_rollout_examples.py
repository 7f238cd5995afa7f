# SPDX-License-Identifier: Apache-2.0
"""The examples of loops that train with a server's step maps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from server.launch import REPLY_SECONDS, Server

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(server: Server, name: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, f"{server.url}/v1"],
        capture_output=True,
        text=True,
        timeout=REPLY_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_trl(server: Server):
    lines = run(server, "trl_rollouts.py")
    found = [
        re.fullmatch(r"advantage (\S+), log p (\S+), tokens \[(.*)\]", line)
        for line in lines
    ]
    assert len(found) == 4
    advantages = [float(match[1]) for match in found]
    assert abs(sum(advantages)) < 0.02
    for match in found:
        assert float(match[2]) <= 0
        assert all(int(count) > 0 for count in match[3].split(", "))


def test_verl(server: Server):
    lines = run(server, "verl_rollouts.py")
    assert len(lines) == 6
    for line in lines:
        tokens, steps, weights, logprob = re.findall(r"-?[\d.]+(?:e-\d+)?", line)
        # The canvas of 16 is written in 4 steps, the text may need fewer.
        assert 1 <= int(steps) <= 4 and int(steps) <= int(tokens) <= 16
        assert float(weights) == 1 and float(logprob) <= 0
