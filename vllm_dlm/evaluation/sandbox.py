# SPDX-License-Identifier: Apache-2.0
"""Runs programs that a model has written, to see whether they pass their tests.

Each program runs in a process of its own (`confined.py`): Python without site-packages
and without our environment, in an empty folder, with limits on time, memory, size of
files and number of open files. Confined, it also

- has a network of its own, with nothing in it;
- sees no processes but its own, which end with it;
- reads Python and what lies in /usr and /lib, writes in its own folder, starts no other
  program.

The first two are Linux's namespaces for users without rights, the third is Landlock. A
system without them is told apart (`Sandbox.check`): nothing runs less confined than was
asked for. The kernel's own interface stays open to the program; against one that
attacks the kernel, run the evaluation in a virtual machine.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_dlm.evaluation import confined

PROBE = "import collections, heapq, math, re\nassert math.gcd(4, 6) == 2\n"
"""A program that passes wherever programs run at all."""


@dataclass(frozen=True)
class Sandbox:
    """How programs are run."""

    seconds: float = 10.0
    """Most wall seconds of a program, and most CPU seconds, rounded up."""
    memory_bytes: int = 1 << 30
    """Most address space; the interpreter's own is a part of it."""
    file_bytes: int = 1 << 20
    """Most bytes of a file that a program writes."""
    confine: bool = True
    """Without it, only the limits hold."""

    def check(self) -> None:
        """Run a program that is right: here, where it fails, none could pass.

        Raises:
            ValueError: it fails; the message says what to do.
        """
        if self.passes(PROBE):
            return
        if self.confine and replace(self, confine=False).passes(PROBE):
            raise ValueError(
                "--allow-code: this system cannot keep a program from the network and "
                "from your files (it takes Linux with user namespaces and Landlock, "
                "5.13 or later). In a container of its own without a network: "
                "--allow-code unconfined"
            )
        raise ValueError(
            "--allow-code: not even a program that only imports modules runs here, "
            f"with {sys.executable}"
        )

    def passes(self, program: str) -> bool:
        """Whether a program runs to its end, without an error, within the limits."""
        token = secrets.token_hex(16)
        task = {
            "program": program,
            "token": token,
            "confine": self.confine,
            "memory_bytes": self.memory_bytes,
            "cpu_seconds": int(self.seconds) + 1,
            "file_bytes": self.file_bytes,
        }
        with tempfile.TemporaryDirectory(prefix="vllm-dlm-code-") as folder:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(Path(confined.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                start_new_session=True,
            )
            try:
                written, _ = process.communicate(
                    json.dumps(task).encode() + b"\n", timeout=self.seconds
                )
            except subprocess.TimeoutExpired:
                return False
            finally:
                _end(process)
        return written == token.encode()

    def pass_all(self, programs: Sequence[str]) -> list[bool]:
        """As `passes`, of many, as many at a time as there are cores."""
        workers = len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(self.passes, programs))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program, and what it may have left in its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
