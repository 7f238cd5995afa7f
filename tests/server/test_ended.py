# SPDX-License-Identifier: Apache-2.0
"""A server that loses a process, or is told to end, while it answers.

Clients get an error or a closed connection, never silence and never half a text as if
it were whole; the server is gone afterwards, with all its processes, and leaves no
shared memory behind.
"""

from __future__ import annotations

import signal
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
from server.launch import COMMAND, Server, running_server, until
from server.long_answers import ERRORS, streamed, whole
from server.processes import Processes, still_there

from vllm_dlm.cli.server_process import ServerFailed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

GONE_SECONDS = 180


class Ending:
    """What a server was asked before it ended, and what became of it."""

    def __init__(self, server: Server) -> None:
        self.right = whole(server)
        self.processes = Processes.of(server.url)
        self.everyone = self.processes.all()
        self.may_leave = self.processes.shared_memory()
        assert self.may_leave
        self._pool = ThreadPoolExecutor(6)
        self.replies: list[Future[str]] = [
            self._pool.submit(ask, server) for ask in (whole, streamed) * 3
        ]
        until(lambda: sum(server.load()[:2]) == 6, "they are not there")

    def errors(self) -> list[BaseException]:
        """Those of the requests that have got one; the others have got their text."""
        found = []
        for reply in self.replies:
            if error := reply.exception(timeout=GONE_SECONDS):
                assert isinstance(error, ERRORS), repr(error)
                assert not isinstance(error, openai.APITimeoutError)
                found.append(error)
            else:
                assert reply.result() == self.right
        return found

    def exit_status(self) -> int:
        """The server's; nothing of it is left."""
        status = self.processes.server.wait(timeout=GONE_SECONDS)
        _, alive = psutil.wait_procs(self.everyone, timeout=GONE_SECONDS)
        assert not alive
        assert still_there(self.may_leave) == set()
        return status


@pytest.mark.parametrize("lost", ["engine", "worker", "one of two workers"])
def test_a_lost_process_ends_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
):
    """It is killed, as the system does it when memory runs out."""
    command = list(COMMAND)
    if lost == "one of two workers":
        command += ["--tensor-parallel-size", "2"]
        # By default a worker takes a NUMA node for itself.
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with (
        pytest.raises(ServerFailed, match="the server died"),
        running_server(command, tmp_path / "log") as server,
    ):
        ending = Ending(server)
        processes = ending.processes
        assert len(processes.workers) == 1 + (lost == "one of two workers")
        (processes.engine if lost == "engine" else processes.workers[-1]).kill()
        assert len(ending.errors()) == len(ending.replies)
        ending.exit_status()  # which it is, is vLLM's


@pytest.mark.parametrize("drains", [False, True])
def test_a_server_that_is_told_to_end(tmp_path: Path, drains: bool):
    """By default at once; with `--shutdown-timeout` after what it has begun."""
    command = [*COMMAND, *(("--shutdown-timeout", "60") if drains else ())]
    with (
        pytest.raises(ServerFailed, match="the server died"),
        running_server(command, tmp_path / "log") as server,
    ):
        ending = Ending(server)
        ending.processes.server.send_signal(signal.SIGTERM)
        errors = ending.errors()
        assert bool(errors) == (not drains)
        told = [error for error in errors if "shutting down" in str(error)]
        assert len(told) == len(errors)
        assert ending.exit_status() == 0
