# SPDX-License-Identifier: Apache-2.0
"""The processes of a server that a test has started, and what they leave behind."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import psutil

from vllm_dlm.cli.server_process import server_at

SHARED_MEMORY = "/dev/shm/"


@dataclass(frozen=True)
class Processes:
    """One server's: the one with its port, its engine's, and its workers'."""

    server: psutil.Process
    engine: psutil.Process
    workers: tuple[psutil.Process, ...]

    @classmethod
    def of(cls, url: str) -> Processes:
        """Those of the server that listens at `url`, a child of this process."""
        server = server_at(url)
        named = {" ".join(one.cmdline()): one for one in server.children(True)}
        (engine,) = (one for name, one in named.items() if "EngineCore" in name)
        workers = (one for name, one in sorted(named.items()) if "Worker" in name)
        return cls(server, engine, tuple(workers))

    def all(self) -> list[psutil.Process]:
        """These and all of their children."""
        return [self.server, *self.server.children(recursive=True)]

    def shared_memory(self) -> set[str]:
        """Files of it that would be left behind if nobody cleaned up."""
        found = set()
        for process in self.all():
            with contextlib.suppress(psutil.NoSuchProcess):
                found |= {one.path for one in process.memory_maps()}
        return {path for path in found if path.startswith(SHARED_MEMORY)}


def still_there(paths: set[str]) -> set[str]:
    """Those of the files that exist."""
    return {path for path in paths if Path(path).exists()}
