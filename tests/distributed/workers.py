# SPDX-License-Identifier: Apache-2.0
"""The worker processes of engines that the tests have started."""

from __future__ import annotations

import psutil

_TITLES = {"mp": "VLLM::Worker", "ray": "ray::RayWorkerProc"}


def youngest_workers(backend: str, number: int) -> list[psutil.Process]:
    """The workers that were started last.

    Args:
        backend: "mp" or "ray"; a Ray cluster must be one that this process started.
    """
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            title = " ".join(child.cmdline())
        except psutil.Error:  # gone since, or a zombie
            continue
        if _TITLES[backend] in title:
            found.append(child)
    assert len(found) >= number, found
    return sorted(found, key=lambda process: process.create_time())[-number:]
