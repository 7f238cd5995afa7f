# SPDX-License-Identifier: Apache-2.0
"""Programs that a model has written: which pass, and what they cannot do."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_dlm.evaluation.sandbox import Sandbox

SANDBOX = Sandbox(seconds=20, memory_bytes=1 << 29)

OPEN = replace(SANDBOX, confine=False)

CONNECTS = """
import socket
try:
    socket.create_connection(("127.0.0.1", {port}), timeout=1)
except OSError:
    pass
else:
    raise SystemExit("there is a network")
"""


@pytest.fixture(scope="module", autouse=True)
def programs_run() -> None:
    try:
        SANDBOX.check()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def port() -> Iterator[int]:
    """Of a server on this machine that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("def f(x):\n    return x + 1\nassert f(1) == 2", True),
        ("print('much') ; input", True),
        ("assert False", False),
        ("def f(:", False),
        # Who leaves early has not come to the tests.
        ("raise SystemExit(0)", False),
        ("import os\nos._exit(0)", False),
        ("import os\nos.write(1, b'0' * 32)\nos._exit(0)", False),
        ("x = bytearray(1 << 30)", False),
        ("open('big', 'wb').write(b'0' * (1 << 21))", False),
        ("open('small', 'w').write('x')\nassert open('small').read() == 'x'", True),
        ("import os\nos.fork()", False),
        ("import subprocess\nsubprocess.run(['true'])", False),
        ("import os\nassert 'HOME' not in os.environ", True),
        ("import numpy", False),
    ],
)
def test_what_passes(program: str, passes: bool):
    assert SANDBOX.passes(program) is passes


def test_a_program_that_does_not_end():
    assert not Sandbox(seconds=1).passes("while True: pass")


def test_there_is_no_network(port: int):
    program = CONNECTS.format(port=port)
    assert SANDBOX.passes(program)
    # And it is the program that finds none: with a network it connects.
    assert not OPEN.passes(program)


def test_our_files_are_not_its_own(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("x")
    for program in (
        f"open({str(file)!r}).read()",
        f"open({str(file)!r}, 'w').write('y')",
        f"import os\nos.unlink({str(file)!r})",
        f"import os\nos.mkdir({str(tmp_path / 'new')!r})",
        f"import os\nos.listdir({str(tmp_path)!r})",
    ):
        assert not SANDBOX.passes(program), program
    assert file.read_text() == "x"
    assert OPEN.passes(f"open({str(file)!r}).read()")


def test_our_processes_are_not_its_own():
    program = f"import os\nos.kill({os.getpid()}, 0)"
    assert not SANDBOX.passes(program)
    assert OPEN.passes(program)


def test_a_system_that_does_not_confine_is_named(monkeypatch: pytest.MonkeyPatch):
    passes = Sandbox.passes
    monkeypatch.setattr(
        Sandbox, "passes", lambda self, text: not self.confine and passes(self, text)
    )
    with pytest.raises(ValueError, match="--allow-code unconfined"):
        SANDBOX.check()
    OPEN.check()


def test_many_keep_their_order():
    programs = ["assert True", "assert False", "", "1 / 0"]
    assert SANDBOX.pass_all(programs) == [True, False, True, False]
