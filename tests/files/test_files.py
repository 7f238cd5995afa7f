# SPDX-License-Identifier: Apache-2.0
"""Files are written whole and have their mode; what files are asked for by name."""

import multiprocessing
import os
import resource
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from files.file_kinds import CELL, ENVIRONMENT, KINDS, a_filter, file_of, write_filter

from vllm_dlm import trajectories
from vllm_dlm.bench.cells import Results, digest
from vllm_dlm.files.whole_files import (
    BadFile,
    make_folder,
    open_file,
    parse_json,
    path_part,
    remembered,
    replacing,
    write_text,
)
from vllm_dlm.model_executor.sampling.trajectory_log import TrajectoryLog
from vllm_dlm.model_executor.slots import RequestSlots
from vllm_dlm.spec_decode.specdec_pp.head import HEAD_FILE, AcceptanceHead
from vllm_dlm.strategies.learn2pd_files import filter_path
from vllm_dlm.strategies.learn2pd_filter import Filter
from vllm_dlm.training.tiny.export import export
from vllm_dlm.training.tiny.llada_modeling import LLaDAModel, LLaDAShape

SHAPE = LLaDAShape(vocab_size=11, d_model=8, n_layers=2, n_heads=2, mlp_hidden_size=8)

# Opening a pipe, or counting to 99999999, would take for ever.
pytestmark = pytest.mark.timeout(120)


# Writing --------------------------------------------------------------------------


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


OURS_TO_WRITE = [
    kind for kind in KINDS if kind not in ("released head", "pickled head")
]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o000])
@pytest.mark.parametrize("kind", OURS_TO_WRITE)
def test_modes(kind: str, mask: int, tmp_path: Path) -> None:
    path = file_of(kind, tmp_path)
    with umask(mask):
        for _ in range(2):  # new, and in place of an old one
            KINDS[kind].write(path)
            expected = 0o600 if KINDS[kind].private else 0o666 & ~mask
            assert mode_of(path) == expected
            path.chmod(0o640)


def test_modes_of_a_models_folder(tmp_path: Path) -> None:
    with umask(0o022):
        export(LLaDAModel(SHAPE), tmp_path / "model")
    assert {mode_of(file) for file in (tmp_path / "model").iterdir()} == {0o644}


def test_private_folders(tmp_path: Path) -> None:
    with umask(0o000):
        trajectories.check_folder(str(tmp_path / "logs"), where="a test")
        make_folder(tmp_path / "filters" / "of one")
    assert mode_of(tmp_path / "logs") == 0o700
    assert mode_of(tmp_path / "filters") == 0o777


def test_a_servers_log_is_private(tmp_path: Path) -> None:
    slots = RequestSlots(1, 8, 0, torch.device("cpu"))
    with umask(0o000):
        TrajectoryLog(slots, 0, str(tmp_path))
        TrajectoryLog(slots, 0, str(tmp_path))
    assert [mode_of(log) for log in tmp_path.iterdir()] == [0o600] * 2


WRITERS, SAVES = 4, 100


def _save(path: Path, number: int) -> None:
    for _ in range(SAVES):
        Filter.identity(4, 0.5 + number / 10).save(path)


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "filters" / "b4-none.safetensors"
    start = multiprocessing.get_context("fork")
    writers = [start.Process(target=_save, args=(path, i)) for i in range(WRITERS)]
    write_filter(path)
    for writer in writers:
        writer.start()
    read = 0
    while any(writer.is_alive() for writer in writers):
        assert Filter.load(path).block_length == 4
        read += 1
    assert [writer.exitcode for writer in writers] == [0] * WRITERS
    assert read
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("kind", OURS_TO_WRITE)
def test_a_full_disk_leaves_the_old_file(kind: str, tmp_path: Path) -> None:
    """No file may grow beyond 16 bytes: a write ends in the middle."""
    path = file_of(kind, tmp_path)
    KINDS[kind].write(path)
    before = path.read_bytes()

    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
        if kind == "results":
            results = Results(path, resume=True, environment=ENVIRONMENT)
            results.add(CELL)
        else:
            KINDS[kind].write(path)

    child = os.fork()
    if child == 0:
        try:
            write()
        except BaseException:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert path.read_bytes() == before
    left = [file for file in tmp_path.rglob("*") if file.is_file() and file != path]
    assert left == []


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    child = os.fork()
    if child == 0:
        with replacing(path) as part:
            part.write_text("ne")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert path.read_text() == "old"
    write_text(path, "new")  # what was left is in nobody's way
    assert path.read_text() == "new"


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), replacing(tmp_path / "new" / "file") as part:
        part.write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path / "new") == []


def test_a_disk_that_is_full_when_it_is_asked(tmp_path: Path, monkeypatch) -> None:
    """Some file systems take what they have no room for."""

    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    write_text(path := tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_leads_where_it_did(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "goal")
    for text in ("one", "two"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "goal").read_text() == text
        assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_only_files_are_replaced(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "goal")
    with pytest.raises(ValueError, match="name an ordinary file"):
        write_text(tmp_path / "goal", "text")
    assert os.listdir(tmp_path) == ["goal"]
    with pytest.raises(ValueError, match="it is a device"):
        write_text("/dev/null", "text")


def test_filters_of_nan_are_not_saved(tmp_path: Path) -> None:
    filter = a_filter()
    filter.w2[1, 2] = float("nan")
    with pytest.raises(ValueError, match="w2 of the filter holds NaN"):
        filter.save(tmp_path / "f.safetensors")
    assert os.listdir(tmp_path) == []


# Names ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/etc", "a/b", "../a", "a\0b", "a\n", "~", "x" * 81]
)
def test_names_that_lead_elsewhere(name: str) -> None:
    with pytest.raises(ValueError, match="model_key"):
        path_part(name, "model_key")
    with pytest.raises(ValueError, match="model_key"):
        filter_path(Path("filters"), Filter(*_weights(), model_key=name, cache="none"))
    with pytest.raises(ValueError, match="cache"):
        filter_path(Path("filters"), Filter(*_weights(), model_key="m", cache=name))


def _weights() -> list[torch.Tensor]:
    filter = a_filter()
    return [filter.w1, filter.b1, filter.w2, filter.b2]


@pytest.mark.parametrize("name", ["llada-tiny-0a1b", ".hidden-0a", "Größe_2.0-ab"])
def test_names_of_models(name: str) -> None:
    assert path_part(name, "model_key") == name


# Files that are asked for again -----------------------------------------------------


def test_a_file_is_read_again_when_it_has_changed(tmp_path: Path) -> None:
    path, reads = tmp_path / "file", []

    def read(path: Path) -> str:
        with open_file(path, "test") as file:
            reads.append(file.read().decode())
        return reads[-1]

    look = remembered(read)
    with pytest.raises(BadFile, match="No such file"):
        look(path)
    for text in ("one", "two"):
        write_text(path, text)
        assert [look(path), look(str(path))] == [text] * 2
    assert reads == ["one", "two"]


@pytest.mark.parametrize("name", ["", "\0", "x" * 5000])
def test_names_of_no_file(name: str) -> None:
    with pytest.raises(BadFile):
        open_file(name, "test")
    with pytest.raises(BadFile):
        remembered(lambda path: open_file(path, "test"))(name)


@pytest.mark.parametrize("text", ["x" * 5000, "a\0b", "/dev/zero", ""])
def test_options_that_name_no_file_have_a_digest(text: str) -> None:
    assert digest({"option": text}) != digest({"option": text + "."})


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}', "[" * 100_000])
def test_damaged_tokenizers(content: str, tmp_path: Path) -> None:
    from vllm_dlm.training.drafters.teacher import load_tokenizer

    export(LLaDAModel(SHAPE), tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=f"cannot load the tokenizer of {tmp_path}"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', "", "{"])
def test_json_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="not valid JSON"):
        parse_json(text)


def test_a_heads_folder_is_no_file(tmp_path: Path) -> None:
    os.makedirs((tmp_path / HEAD_FILE).parent)
    os.mkfifo(tmp_path / HEAD_FILE)
    with pytest.raises(ValueError, match="it is a pipe"):
        AcceptanceHead.load(tmp_path)
