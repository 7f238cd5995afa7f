# SPDX-License-Identifier: Apache-2.0
"""Which file of tests a process takes next where several share the work: `make test`.

Tests of a folder share engines and servers, which each process starts for itself. So
a process stays in its folder, and then takes a costly one in which nobody is. When
none is left it helps in the costly folders of others. Tests that cost little and
share nothing come last: they fill the gap until the longest of the others has ended.
"""

from __future__ import annotations

from collections.abc import Iterable

COSTLY = (
    *("tests/engine", "tests/server", "tests/spec_decode", "tests/switching"),
    *("tests/training", "tests/bench", "tests/search", "tests/distributed"),
    *("tests/steering", "tests/evaluation"),
    # Programs in processes of their own, which import vLLM.
    "tests",
)
"""Folders whose tests start engines, servers or programs; the longest come first."""


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

    def rank(folder: str) -> tuple[bool, bool, int, str]:
        costly = folder in COSTLY
        place = COSTLY.index(folder) if costly else 0
        return not costly, folder in others, place, folder

    folder = min(files, key=rank)
    # Help begins at the end: whoever is there goes on from the beginning.
    return files[folder][-1 if folder in others else 0]
