# SPDX-License-Identifier: Apache-2.0
"""A `vllm serve` process: started on a free port, waited for, stopped in the end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil

VLLM = str(Path(sys.executable).with_name("vllm"))
START_SECONDS = 900
STOP_SECONDS = 60
"""Limits against hanging, generous: cores may be shared."""


class ServerFailed(RuntimeError):
    """A server that did not start, or ended by itself."""


@contextlib.contextmanager
def serving(
    command: Sequence[str],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    waiting: Callable[[float], object] = lambda seconds: None,
) -> Iterator[str]:
    """Run a server; the value is its address, once it answers.

    Args:
        command: a `vllm serve`, without host and port.
        log: file for what it prints.
        environment: its variables; None for those of this process.
        waiting: called twice a second until it answers, with the seconds so far.

    Raises:
        ServerFailed: it did not start within `START_SECONDS`, or it was gone in the
            end; with the end of the log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            # A group of their own, of which nothing is left in the end.
            start_new_session=True,
        )
    try:
        started = time.monotonic()
        while not _answers(url):
            seconds = time.monotonic() - started
            waiting(seconds)
            if process.poll() is not None or seconds > START_SECONDS:
                raise ServerFailed(f"the server did not start:\n{tail(log)}")
            time.sleep(0.5)
        yield url
        if process.poll() is not None:
            raise ServerFailed(f"the server died:\n{tail(log)}")
    finally:
        _end(process)


def server_at(url: str) -> psutil.Process:
    """The server at an address, which this process has started (`serving`).

    Raises:
        ValueError: there is none.
    """
    port = url.rpartition(":")[2]
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # gone since, or a zombie
            if {"serve", port} <= set(child.cmdline()):
                return child
    raise ValueError(f"no child of this process serves {url}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server, in order if it can, and the processes that it has left behind.

    Its engine's outlive one that is killed, or that ends while it starts.
    """
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _answers(url: str) -> bool:
    with contextlib.suppress(URLError, OSError), urlopen(f"{url}/health", timeout=10):
        return True
    return False


def tail(log: Path, num_lines: int = 60) -> str:
    """The end of a server's log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])
