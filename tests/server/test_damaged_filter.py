# SPDX-License-Identifier: Apache-2.0
"""A server whose filters (Learn2PD) are damaged: it answers by the threshold rule."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from server.launch import COMMAND, running_server

from vllm_dlm.config.aliases import local_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

QUESTIONS = {
    "Reverse [Ada, Ben, Carl]": "[Carl, Ben, Ada]",
    "Sort [Eva, Dan, Ada]": "[Ada, Dan, Eva]",
}


def test_it_is_passed_over(tmp_path: Path):
    """One that is cut off before the start, one while the server runs."""
    model = tmp_path / "llada-tiny"
    shutil.copytree(local_folder("llada-tiny"), model)
    filters = model / "learn2pd"
    early, late = filters / "b32-none.safetensors", filters / "b32-prefix.safetensors"
    os.truncate(early, early.stat().st_size // 2)
    command = [str(model) if word == "llada-tiny" else word for word in COMMAND]
    command += ["--served-model-name", "llada-tiny"]
    with running_server(command, log := tmp_path / "log") as server:
        for cache, damaged in (("none", early), ("prefix", late)):
            late.write_bytes(b"nothing")
            own = {"dlm_strategy": "learn2pd", "dlm_cache": cache}
            for question, answer in QUESTIONS.items():
                assert server.text(question, max_tokens=32, vllm_xargs=own) == answer
            told = [
                line for line in log.read_text().splitlines() if str(damaged) in line
            ]
            assert any("it is passed over" in line for line in told), told
        # The third is whole.
        own = {"dlm_strategy": "learn2pd", "dlm_cache": "dual"}
        assert server.text(vllm_xargs=own, max_tokens=32)
        lines = log.read_text().splitlines()
        passed_over = [line for line in lines if "it is passed over" in line]
        assert passed_over and not any("b32-dual" in line for line in passed_over)
