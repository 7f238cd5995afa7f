# SPDX-License-Identifier: Apache-2.0
"""Compiled code on disk: damaged, on a full disk, shared by processes."""

from __future__ import annotations

import importlib.util
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_dlm.kernels.numba_jit import jit

SOURCE = """\
def total(values):
    found = 0.0
    for value in values:
        found += value
    return found
"""
SINGLE, DOUBLE = np.arange(5, dtype=np.float32), np.arange(7, dtype=np.float64)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = pytest.importorskip("numba").config
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fresh(cache: Path, tmp_path: Path) -> Callable[[], Any]:
    """The function as a new process has it: compiled code is on disk alone."""
    (path := tmp_path / "loops.py").write_text(SOURCE)

    def make() -> Any:
        spec = importlib.util.spec_from_file_location("loops", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return jit()(module.total)

    return make


def files(cache: Path, suffix: str) -> list[Path]:
    return sorted(cache.rglob(f"*.{suffix}"))


def was_loaded(total: Any) -> bool:
    return bool(total.stats.cache_hits)


def test_another_process_loads_it(cache: Path, fresh: Callable[[], Any]):
    total = fresh()
    assert (total(SINGLE), total(DOUBLE)) == (10, 21)
    assert len(files(cache, "nbi")) == 1 and len(files(cache, "nbc")) == 2
    again = fresh()
    assert (again(SINGLE), again(DOUBLE)) == (10, 21)
    assert again.stats.cache_hits and not again.stats.cache_misses


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", [b"", b"nothing", 100])
def test_damaged_files_are_replaced(
    cache: Path, fresh: Callable[[], Any], suffix: str, damage: bytes | int
):
    assert fresh()(SINGLE) == 10
    (path,) = files(cache, suffix)
    whole = path.read_bytes()
    path.write_bytes(whole[:damage] if isinstance(damage, int) else damage)
    again = fresh()
    assert again(SINGLE) == 10 and not was_loaded(again)
    last = fresh()
    assert last(SINGLE) == 10 and was_loaded(last)


def test_a_full_disk(cache: Path, fresh: Callable[[], Any]):
    """No file may grow beyond 16 bytes."""
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
            os._exit(0 if fresh()(SINGLE) == 10 else 8)
        except BaseException:
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not files(cache, "nbc")
    assert fresh()(SINGLE) == 10


def test_two_processes_compile_for_different_types(fresh: Callable[[], Any]):
    """Neither has seen the other's entry, and one writes in the midst of the other.
    numba gives both the same number: the index then leads to the other's code."""
    one, other = fresh(), fresh()
    for process in (one, other):
        process._cache._cache_file._load_index = dict  # as it was when they looked
    file = one._cache._cache_file
    write = file._save_data

    def write_late(name: str, data: Any) -> None:
        assert other(DOUBLE) == 21
        write(name, data)

    file._save_data = write_late
    assert one(SINGLE) == 10
    for _ in range(2):
        later = fresh()
        assert (later(SINGLE), later(DOUBLE)) == (10, 21)
    assert was_loaded(later)
