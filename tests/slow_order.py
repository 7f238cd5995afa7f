# SPDX-License-Identifier: Apache-2.0
"""In which order the slow tests run where time may not suffice for all: `.ci/run`.

The files are cut into thirds, and a run begins with one of these: run number n with
third n modulo 3, and then the others, round and round. A file stays in one piece, and
files keep their order, so tests that share engines follow each other, but for one
place at most. If every run gets through its own third, any three runs with
consecutive numbers reach all tests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

PARTS = 3


def thirds(files: Sequence[str]) -> list[list[str]]:
    """Cut files into three runs of about as many tests each.

    Args:
        files: the file of each test, in their order.

    Returns:
        Three lists of different files, which together are all, in the order of `files`;
        with few files some are empty.
    """
    counts = Counter(files)
    parts: list[list[str]] = [[] for _ in range(PARTS)]
    before = 0
    for file, count in counts.items():
        # By where its middle lies.
        place = (2 * before + count) * PARTS // (2 * len(files))
        parts[place].append(file)
        before += count
    return parts


def order(files: Sequence[str], run: int) -> list[str]:
    """All different files, in the order of run number `run`.

    Args:
        files: the file of each test, in their order.
    """
    parts = thirds(files)
    first = run % PARTS
    return [file for part in parts[first:] + parts[:first] for file in part]


def unreached(tests: Sequence[tuple[str, str]], reached: set[str]) -> list[str]:
    """What to say of tests that were not run: a line for each file that has some.

    Args:
        tests: file and name of each test.
        reached: names of those that were.
    """
    of_file = Counter(file for file, _ in tests)
    left = Counter(file for file, name in tests if name not in reached)
    return [f"{file} ({count} of {of_file[file]})" for file, count in left.items()]
