# SPDX-License-Identifier: Apache-2.0
"""Runs one program that a model has written, confined; see `sandbox.py`.

This file is run as a script, by an interpreter without site-packages, and imports
nothing of the package. From its standard input comes one line of JSON: the program, a
token, and the limits. If the program runs to its end, the token is written to standard
output, where the program's own output does not go.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from typing import Any

NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""Landlock's system calls, by which a process gives up rights on files."""
NO_NEW_PRIVILEGES = 38
READ = 1 << 2 | 1 << 3
"""Landlock's rights: reading files, and listing folders."""
WRITE = 1 << 1 | sum(1 << bit for bit in range(4, 13))
EXECUTE, REFER, TRUNCATE = 1 << 0, 1 << 13, 1 << 14

_libc = ctypes.CDLL(None, use_errno=True)


class _Rule(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("access", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def main() -> None:
    """Confine this process, and run the program."""
    task: dict[str, Any] = json.loads(sys.stdin.readline())
    answer = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    if task["confine"]:
        _leave()
        _give_files_up()
    _limit(task)
    program = compile(task["program"], "<program>", "exec")
    exec(program, {"__name__": "__main__"})
    os.write(answer, task["token"].encode())


def _leave() -> None:
    """Go on among no processes, in a network in which there is nothing.

    The process that comes back is the first one there: with it, all others end.
    """
    _call(_libc.unshare(NEW_USER | NEW_PROCESSES | NEW_NETWORK))
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) != 0)


def _give_files_up() -> None:
    """Read nothing but Python and what lies open for all; write in this folder."""
    version = _call(_libc.syscall(CREATE_RULESET, None, 0, 1))
    writes = WRITE | REFER * (version >= 2) | TRUNCATE * (version >= 3)
    handled = ctypes.c_uint64(READ | EXECUTE | writes)
    size = ctypes.c_size_t(8)
    rules = _call(_libc.syscall(CREATE_RULESET, ctypes.byref(handled), size, 0))
    allowed = {".": READ | writes, sys.base_prefix: READ, sys.prefix: READ}
    allowed |= dict.fromkeys(("/usr", "/lib", "/lib64"), READ)
    for path, access in allowed.items():
        if os.path.isdir(path):
            rule = _Rule(access, os.open(path, os.O_PATH))
            _call(_libc.syscall(ADD_RULE, rules, 1, ctypes.byref(rule), 0))
    _call(_libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _call(_libc.syscall(RESTRICT_SELF, rules, 0))


def _call(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "this system does not confine programs")
    return result


def _limit(task: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_AS: task["memory_bytes"],
        resource.RLIMIT_CPU: task["cpu_seconds"],
        resource.RLIMIT_FSIZE: task["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        # No process and no thread beside this one; root may have some all the same.
        resource.RLIMIT_NPROC: 0,
    }
    for which, most in limits.items():
        resource.setrlimit(which, (most, most))


if __name__ == "__main__":
    main()
