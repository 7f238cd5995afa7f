# SPDX-License-Identifier: Apache-2.0
"""A disk that is full while a server answers: no file may grow, its log's included.

Clients notice nothing. What a filter that is learned does then, and files of each kind:
tests/files/test_files.py.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from re import fullmatch

import pytest
from server.launch import COMMAND, Server, running_server
from server.processes import Processes

from vllm_dlm.trajectories import read

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

QUESTION, ANSWER = "Reverse [Ada, Ben, Carl]", "[Carl, Ben, Ada]"
LISTS = r"\[[A-Z][a-z]+(, [A-Z][a-z]+){1,%d}\]"
"""A pattern; each length is compiled for itself, and is a file of its own."""


@contextmanager
def full_disk(url: str) -> Iterator[None]:
    """As for a server's processes: no file grows beyond a byte."""
    limits = {
        process.pid: resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        for process in Processes.of(url).all()
    }
    for pid, (_, most) in limits.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, most))
    yield
    for pid, before in limits.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file, by its path in the folder."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file()
    }


def written(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """Files that have more bytes than before."""
    return {path for path, size in after.items() if size > before.get(path, 0)}


def ask(server: Server) -> None:
    assert server.text(QUESTION, max_tokens=32) == ANSWER
    stream = server.complete(QUESTION, max_tokens=32, stream=True)
    assert "".join(event.choices[0].text for event in stream) == ANSWER


def match(server: Server, longest: int) -> None:
    """Patterns have loops of their own, which numba compiles for the first of them."""
    wanted = {"regex": LISTS % longest}
    text = server.text(QUESTION, max_tokens=64, structured_outputs=wanted)
    assert fullmatch(wanted["regex"], text)


def test_clients_notice_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("numba", "steps", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    command = [*COMMAND, "--dlm-trajectory-dir", str(tmp_path / "steps")]
    with running_server(command, tmp_path / "log") as server:
        ask(server)
        (log,) = (tmp_path / "steps").iterdir()
        with full_disk(server.url):
            before = sizes(tmp_path)
            ask(server)
            match(server, 3)
            meanwhile = sizes(tmp_path)
        assert written(before, meanwhile) == set()
        # The log of steps has ended; what else is kept is kept again.
        match(server, 4)
        assert server.text(QUESTION, max_tokens=32, temperature=0.8, seed=1)
        again = {path.partition("/")[0] for path in written(meanwhile, sizes(tmp_path))}
        assert again == {"numba", "tmp", "log"}
        assert len(list(read(log))) == 2
