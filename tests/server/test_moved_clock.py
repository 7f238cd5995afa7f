# SPDX-License-Identifier: Apache-2.0
"""A clock that jumps while a server answers, as when a machine's time is set."""

from __future__ import annotations

import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from server.launch import COMMAND, REPLY_SECONDS, Server, running_server, until
from server.long_answers import streamed, whole

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

HOUR = 3600
SHIM = Path(__file__).with_name("moved_clock.c")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clock")


@pytest.fixture(scope="module")
def move(folder: Path) -> Callable[[int], None]:
    """`move(seconds)`: how far the server's clock is from this process's."""
    path = folder / "seconds"

    def write(seconds: int) -> None:
        with path.open("r+b" if path.exists() else "wb") as file:
            file.write(struct.pack("l", seconds))

    write(0)
    return write


@pytest.fixture(scope="module")
def server(folder: Path, move: Callable[[int], None]) -> Iterator[Server]:
    library = folder / "moved_clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, SHIM], check=True)
    preloaded = [str(library), os.environ.get("LD_PRELOAD", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", ":".join(filter(None, preloaded)))
        patch.setenv("MOVED_CLOCK", str(folder / "seconds"))
        with running_server(COMMAND, folder / "log") as running:
            yield running


def ahead(server: Server) -> float:
    """Seconds by which an answer's `created` is later than it is here."""
    return server.complete(max_tokens=1).created - time.time()


@pytest.mark.parametrize("seconds", [HOUR, -HOUR], ids=["forward", "backward"])
def test_a_jump_under_load(server: Server, move: Callable[[int], None], seconds: int):
    """Every text is whole and the same, those under way and later ones."""
    move(0)
    right = whole(server)
    with ThreadPoolExecutor(6) as pool:
        replies = [pool.submit(ask, server) for ask in (whole, streamed) * 3]
        until(lambda: sum(server.load()[:2]) == 6, "they are not there")
        move(seconds)
        assert ahead(server) == pytest.approx(seconds, abs=REPLY_SECONDS)
        assert [reply.result() for reply in replies] == [right] * 6
        again = list(pool.map(lambda ask: ask(server), (whole, streamed) * 3))
    assert again == [right] * 6
    server.wait_until_idle()
