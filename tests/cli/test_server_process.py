# SPDX-License-Identifier: Apache-2.0
"""A server that is started for a while leaves no process behind."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from vllm_dlm.cli import server_process

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
SLEEPER = f"{DEAF} time.sleep(600)"
STARTING = f"""\
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {SLEEPER!r}])
open(sys.argv[1], "w").write(str(child.pid))
{SLEEPER}
"""


def test_one_that_never_answers_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the two listens to SIGTERM."""
    monkeypatch.setattr(server_process, "STOP_SECONDS", 0.1)
    pid = tmp_path / "pid"

    def waiting(seconds: float) -> None:
        if pid.is_file() and pid.read_text():
            monkeypatch.setattr(server_process, "START_SECONDS", 0)

    command = [sys.executable, "-c", STARTING, str(pid)]
    with (
        pytest.raises(server_process.ServerFailed, match="did not start"),
        server_process.serving(command, tmp_path / "log", waiting=waiting),
    ):
        pass
    left = [
        each
        for each in psutil.process_iter(["pid", "status"])
        if each.info["pid"] == int(pid.read_text())
        and each.info["status"] != psutil.STATUS_ZOMBIE
    ]
    assert not left


@contextlib.contextmanager
def child(*words: str) -> Iterator[subprocess.Popen]:
    """A process that waits for its end, with words behind its command."""
    command = [sys.executable, "-c", "print(flush=True); input()", *words]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()  # it runs: its words can be read
        yield process


def test_a_server_is_found_by_its_port_beside_other_children_and_ended_ones() -> None:
    with child("serve", "x", "8001") as ended, child("serve", "x", "8002") as right:
        ended.kill()
        process = psutil.Process(ended.pid)
        while process.status() != psutil.STATUS_ZOMBIE:
            pass
        assert server_process.server_at("http://127.0.0.1:8002").pid == right.pid
        with pytest.raises(ValueError, match="no child of this process serves"):
            server_process.server_at("http://127.0.0.1:8001")
