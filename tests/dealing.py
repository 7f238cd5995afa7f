# SPDX-License-Identifier: Apache-2.0
"""Which file of tests a process takes next where several share the work: `make test`.

Tests of a folder share engines and servers, which each process starts for itself. So
a process stays in its folder, and then takes one in which nobody is: those that need
engines first, because they take longest. When none is left it takes files out of the
folders of others, so that all processes are busy to the end.
"""

from __future__ import annotations

from collections.abc import Iterable

COSTLY = "engine server spec_decode switching training bench distributed".split()
"""Folders whose tests start engines or servers, or train; the longest come first."""


def folder_of(file: str) -> str:
    """The folder of a file of tests, from the root of the repository."""
    return file.rpartition("/")[0]


def next_file(waiting: Iterable[str], mine: str | None, others: set[str]) -> str:
    """Choose one of the files that nobody has begun.

    Args:
        waiting: those files, at least one.
        mine: folder of the file that this process took last; None at the beginning.
        others: folders of the files that the other processes took last.
    """
    files: dict[str, list[str]] = {}
    for file in sorted(waiting):
        files.setdefault(folder_of(file), []).append(file)
    if mine in files:
        return files[mine][0]
    free = sorted(files.keys() - others, key=_place)
    if free:
        return files[free[0]][0]
    # From the end: whoever is in that folder goes on from the beginning.
    return max(files.values(), key=len)[-1]


def _place(folder: str) -> tuple[int, str]:
    name = folder.removeprefix("tests/")
    return COSTLY.index(name) if name in COSTLY else len(COSTLY), folder
