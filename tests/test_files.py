# SPDX-License-Identifier: Apache-2.0
"""Files: what is written is whole and has its mode, what is read is checked.

Each reader and writer of the package stands in a table, and is put through the same.
"""

import json
import multiprocessing
import os
import resource
import signal
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_dlm import trajectories
from vllm_dlm.bench.cells import Results, digest
from vllm_dlm.files import (
    BadFile,
    make_folder,
    open_file,
    parse_json,
    path_part,
    read_lines,
    remembered,
    replacing,
    write_json,
    write_text,
)
from vllm_dlm.model_executor.model_key import weights_digest
from vllm_dlm.model_executor.traces import Traces
from vllm_dlm.model_executor.trajectory_log import TrajectoryLog
from vllm_dlm.spec_decode.specdec_pp import HEAD_FILE, AcceptanceHead
from vllm_dlm.spec_decode.trigram_table import TrigramCounts, load_table, save_table
from vllm_dlm.strategies.learn2pd_filter import Filter, load_filter
from vllm_dlm.strategies.token_frequencies import load_frequencies, save_frequencies
from vllm_dlm.training.drafters import load_drafter
from vllm_dlm.training.evaluation import load_model
from vllm_dlm.training.export import export
from vllm_dlm.training.filter import filter_path
from vllm_dlm.training.llama_modeling import LlamaModel, export_llama, load_llama
from vllm_dlm.training.modeling import LLaDAModel, LLaDAShape
from vllm_dlm.training.progress import Progress, read_progress, write_progress
from vllm_dlm.training.teacher import RecordedAnswers, load_prompts, read_answers
from vllm_dlm.training.token_counts import read_texts
from vllm_dlm.training.traces import load_traces, save_traces

SHAPE = LLaDAShape(vocab_size=11, d_model=8, n_layers=2, n_heads=2, mlp_hidden_size=8)


@pytest.fixture(autouse=True)
def _nothing_waits() -> Iterator[None]:
    """Opening a pipe, or counting to 99999999, would take for ever."""

    def give_up(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# What is written, and how it is read ---------------------------------------------


def a_filter() -> Filter:
    return Filter.identity(4, 0.9)


def write_filter(path: Path) -> None:
    a_filter().save(path)


def write_frequencies(path: Path) -> None:
    save_frequencies(path, torch.full((5,), 0.2), {})


def write_traces(path: Path) -> None:
    rows = Traces(
        np.full((3, 4), 0.5, np.float32),
        np.ones((3, 4), np.int8),
        np.arange(3, dtype=np.int64),
    )
    save_traces(path, rows, {"model_key": "m-1", "cache": "none", "source": "a test"})


def write_trigrams(path: Path) -> None:
    counts = TrigramCounts(8)
    counts.add([1, 2, 3, 1, 2, 4])
    save_table(path, counts.table())


def write_head(path: Path) -> None:
    """Under the name of a head's file, then where it is asked for."""
    file = AcceptanceHead(8, 2).save(path.parent / f"{path.name}.folder")
    file.rename(path)


def write_released_head(path: Path) -> None:
    """In the layout of the paper's repository."""
    head = {"model.1.weight": torch.zeros(2, 8), "model.1.bias": torch.zeros(2)}
    block = {
        "model.0.linear.weight": torch.eye(8),
        "model.0.linear.bias": torch.ones(8),
    }
    save_file({**head, **block}, path)


def write_pickled_head(path: Path) -> None:
    torch.save(AcceptanceHead(8, 2).state_dict(), path)


def an_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 2)).sum().backward()
    optimizer.step()
    return optimizer


def write_training(path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    progress = Progress(
        model=model.state_dict(),
        optimizers=[an_optimizer(model).state_dict()],
        step=3,
        seconds=1.5,
        seed=1,
    )
    write_progress(path, progress)


def read_training(path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    read_progress(path).restore(path, model, [an_optimizer(model)])


ENVIRONMENT = {"vllm": "0"}
CELL = {
    **{"key": "k", "engine": "plain", "dtype": "float32", "setting": "static"},
    **{"concurrency": 1, "strategy": "static", "strategy_config": {}, "cache": "none"},
    **{"cache_config": {}, "tokens_per_second": 3.5, "accuracy": None},
}


def write_results(path: Path) -> None:
    path.unlink(missing_ok=True)
    Results(path, resume=False, environment=ENVIRONMENT).add(CELL)


def read_results(path: Path) -> None:
    Results(path, resume=True, environment=ENVIRONMENT)


def write_answers(path: Path) -> None:
    answers = RecordedAnswers(made_with={}, prompts=[[1]], answers=[[2, 3]])
    write_json(path, answers.model_dump(), private=True)


def write_log(path: Path) -> None:
    lines = (
        {"request": "r", "prompt": [1, 2], "mask": 9},
        {"request": "r", "block": [0, 2], "step": 0, "writes": [[0, 4]]},
    )
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines), private=True)


def write_prompts(path: Path) -> None:
    write_text(path, '{"prompt": "Copy [Ada]", "text": "x"}\n')


@dataclass(frozen=True)
class Kind:
    """A kind of file."""

    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    suffix: str = ".safetensors"
    private: bool = False


KINDS = {
    "filter": Kind(write_filter, Filter.load),
    "filter, remembered": Kind(write_filter, load_filter),
    "frequencies": Kind(write_frequencies, load_frequencies),
    "traces": Kind(write_traces, load_traces),
    "tri-grams": Kind(write_trigrams, lambda path: load_table(path, 8)),
    "head": Kind(write_head, AcceptanceHead.load),
    "released head": Kind(write_released_head, AcceptanceHead.load),
    "pickled head": Kind(write_pickled_head, AcceptanceHead.load, ".bin"),
    "training": Kind(write_training, read_training, ".pt"),
    "results": Kind(write_results, read_results, ".json"),
    "answers": Kind(write_answers, read_answers, ".json", private=True),
    "log": Kind(
        write_log, lambda p: list(trajectories.read(p)), ".jsonl", private=True
    ),
    "texts": Kind(
        write_prompts, lambda path: list(read_texts([path], "text")), ".jsonl"
    ),
}
TENSORS = [name for name, kind in KINDS.items() if kind.suffix == ".safetensors"]
OF_JSON = ("results", "answers")
LINES = ("log", "texts")


def file_of(kind: str, folder: Path) -> Path:
    return folder / f"good{KINDS[kind].suffix}"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(kind: str, tmp_path: Path) -> None:
    path = file_of(kind, tmp_path)
    KINDS[kind].write(path)
    KINDS[kind].read(path)


# Reading --------------------------------------------------------------------------


def no_file(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe no file of ours \x00")


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def deep_header(path: Path) -> None:
    header = b'{"a":' * 100_000
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def declares_terabytes(path: Path) -> None:
    header = {
        "w1": {"dtype": "F32", "shape": [1 << 20] * 2, "data_offsets": [0, 1 << 42]}
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def links_in_a_circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def a_sparse_giant(path: Path) -> None:
    """1 PiB, of which nothing is on the disk."""
    path.write_bytes(struct.pack("<Q", 64) + b"{}")
    try:
        os.truncate(path, 1 << 43)
    except OSError:
        pytest.skip("no files of 8 TiB here")


EVERYWHERE = [no_file, no_text, a_folder, a_pipe, a_device, links_in_a_circle]
WHOLE = [empty, half]


def refuse(kind: str, path: Path) -> str:
    """The message of the one ValueError, which names the file."""
    with pytest.raises(ValueError) as error:
        KINDS[kind].read(path)
    message = str(error.value)
    assert str(path) in message
    assert len(message) < 2000
    return message


@pytest.mark.parametrize("damage", [*EVERYWHERE, *WHOLE, short, a_sparse_giant])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused(kind: str, damage: Any, tmp_path: Path) -> None:
    path = file_of(kind, tmp_path)
    KINDS[kind].write(path)
    if kind == "results" and damage is no_file:
        pytest.skip("a new one is begun")
    if kind == "log" and damage is a_folder:
        pytest.skip("its files are read")
    if kind in LINES and damage in (*WHOLE, short, a_sparse_giant):
        # Lines are read one at a time; a log may be cut short while it is written.
        pytest.skip("as far as it goes, it is such a file")
    damage(path)
    refuse(kind, path)


@pytest.mark.parametrize("damage", [huge_header, deep_header, declares_terabytes])
@pytest.mark.parametrize("kind", TENSORS)
def test_headers_that_lie(kind: str, damage: Any, tmp_path: Path) -> None:
    path = file_of(kind, tmp_path)
    KINDS[kind].write(path)
    damage(path)
    refuse(kind, path)


def tensors_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
        return tensors, dict(file.metadata() or {})


def names_of(kind: str, folder: Path) -> list[str]:
    KINDS[kind].write(path := folder / "names")
    return sorted(tensors_of(path)[0])


def with_one(tensor: torch.Tensor, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "missing": lambda tensor: None,
    "of another type": lambda tensor: tensor.to(torch.int16),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "of one dimension more": lambda tensor: tensor[None],
    "longer": lambda tensor: torch.cat([tensor, tensor]),
    "empty": lambda tensor: tensor[:0],
    "a number": lambda tensor: tensor.new_zeros(()),
    "NaN": lambda tensor: with_one(tensor.float(), float("nan")),
    "infinite": lambda tensor: with_one(tensor.float(), float("-inf")),
}
LONGER_IS_FINE = {("frequencies", "frequencies")}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", TENSORS)
def test_each_tensor_is_checked(kind: str, change: str, tmp_path: Path) -> None:
    path = file_of(kind, tmp_path)
    for name in names_of(kind, tmp_path):
        if change == "longer" and (kind, name) in LONGER_IS_FINE:
            continue
        KINDS[kind].write(path)
        tensors, metadata = tensors_of(path)
        changed = CHANGES[change](tensors[name])
        tensors = {**tensors, name: changed}
        kept = {key: value for key, value in tensors.items() if value is not None}
        save_file(kept, path, metadata=metadata)
        message = refuse(kind, path)
        if kind not in ("head", "released head"):  # of which names are not fixed
            assert name in message


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("filter", "threshold", "2"),
        ("filter", "threshold", "nan"),
        ("filter", "threshold", "many"),
        ("filter", "false_positive_rate", "inf"),
        ("filter", "block_length", "5"),
        ("filter", "model_key", "a\nb"),
        ("filter", "source", "x" * 100_000),
        ("traces", "model_key", "/etc"),
        ("traces", "model_key", "../up"),
        ("traces", "model_key", ".."),
        ("traces", "model_key", ""),
        ("traces", "model_key", "x" * 500),
        ("traces", "cache", "../../cache"),
        ("traces", "cache", "none/x"),
        ("tri-grams", "format", "tri-grams 2"),
    ],
)
def test_metadata_is_checked(kind: str, field: str, value: str, tmp_path: Path) -> None:
    KINDS[kind].write(path := file_of(kind, tmp_path))
    tensors, metadata = tensors_of(path)
    save_file(tensors, path, metadata={**metadata, field: value})
    assert field in refuse(kind, path)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("frequencies", [0.5, 0.0]),
        ("frequencies", [0.5, -0.1]),
        ("frequencies", [0.5, 1.5]),
    ],
)
def test_frequencies_are_shares(name: str, values: list[float], tmp_path: Path) -> None:
    path = file_of("frequencies", tmp_path)
    save_file({name: torch.tensor(values)}, path)
    assert name in refuse("frequencies", path)


@pytest.mark.parametrize(
    ("name", "value"), [("confidence", 2.0), ("label", 3), ("label", -1)]
)
def test_traces_hold_what_is_recorded(name: str, value: float, tmp_path: Path) -> None:
    KINDS["traces"].write(path := file_of("traces", tmp_path))
    tensors, metadata = tensors_of(path)
    save_file({**tensors, name: with_one(tensors[name], value)}, path, metadata)
    assert name in refuse("traces", path)


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("firsts", -1, 1),
        ("firsts", 2, 99),
        ("starts", 0, 1),
        ("starts", 1, 50),
        ("seconds", 0, 8),
        ("seconds", 0, -1),
        ("tokens", 0, 8),
        ("weights", 0, 0),
    ],
)
def test_no_look_up_leaves_a_table(
    name: str, index: int, value: int, tmp_path: Path
) -> None:
    KINDS["tri-grams"].write(path := file_of("tri-grams", tmp_path))
    tensors, metadata = tensors_of(path)
    tensors[name][index] = value
    save_file(tensors, path, metadata)
    assert name in refuse("tri-grams", path)


@pytest.mark.parametrize(
    "name",
    ["model.99999999.weight", "model.65.weight", f"model.{'9' * 6000}.weight"],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_heads_blocks_are_counted(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"head{suffix}"
    tensors = {name: torch.zeros(2, 8), "model.0.linear.weight": torch.zeros(8, 8)}
    (save_file if suffix == ".safetensors" else torch.save)(tensors, path)
    kind = "head" if suffix == ".safetensors" else "pickled head"
    assert "at most 64 blocks" in refuse(kind, path)


class Stranger:
    """What a pickle may name, and nobody unpickles."""


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        {},
        {1: torch.zeros(2)},
        {"output.weight": "x", "output.bias": 3},
        {"output.weight": torch.zeros(1, 1).expand(2, 1 << 40)},
        {"output.weight": torch.zeros(2, 8).to_sparse(), "output.bias": torch.ones(2)},
        {"output.weight": torch.zeros(2, 8)},
        Stranger(),
    ],
    ids=str,
)
def test_pickled_heads_of_another_type(state: Any, tmp_path: Path) -> None:
    torch.save(state, path := tmp_path / "head.bin")
    refuse("pickled head", path)


@pytest.mark.parametrize("kind", ["pickled head", "training"])
def test_checkpoints_do_not_unpack_without_bound(kind: str, tmp_path: Path) -> None:
    """8 MiB of a zip archive that are said to be 2 TiB."""
    KINDS[kind].write(path := file_of(kind, tmp_path))
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    directory = path.read_bytes()
    begin = directory.index(b"PK\x01\x02")
    # The size of the first file, in the archive's directory.
    changed = directory[: begin + 24] + struct.pack("<I", 0xFFFFFFF0)
    path.write_bytes(changed + directory[begin + 28 :])
    refuse(kind, path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", "one"),
        ("step", -1),
        ("seconds", float("nan")),
        ("optimizers", []),
        ("optimizers", [{}]),
        ("model", {"weight": torch.full((2, 2), float("nan")), "bias": torch.ones(2)}),
        ("model", {"weight": torch.zeros(3, 2), "bias": torch.ones(2)}),
        ("model", {"bias": torch.ones(2)}),
    ],
)
def test_training_goes_on_from_sound_checkpoints(
    field: str, value: Any, tmp_path: Path
) -> None:
    KINDS["training"].write(path := file_of("training", tmp_path))
    state = torch.load(path, weights_only=True)
    torch.save({**state, field: value}, path)
    refuse("training", path)
    state.pop(field)
    torch.save(state, path)
    assert field in refuse("training", path)


def test_an_optimizers_state_is_finite(tmp_path: Path) -> None:
    KINDS["training"].write(path := file_of("training", tmp_path))
    state = torch.load(path, weights_only=True)
    state["optimizers"][0]["state"][0]["exp_avg"].fill_(float("inf"))
    torch.save(state, path)
    assert "exp_avg" in refuse("training", path)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        '"x"',
        "{",
        '{"a": NaN}',
        "[" * 200_000,
        '{"a":' * 200_000,
        '{"version": 2, "environments": [], "cells": []}',
        '{"version": 1}',
        '{"version": 1, "environments": 3, "cells": []}',
        '{"version": 1, "environments": [], "cells": [3]}',
        '{"version": 1, "environments": [], "cells": [{"key": 3}]}',
        json.dumps({"version": 1, "environments": [], "cells": [{**CELL, "x": "y"}]}),
        json.dumps(
            {"version": 1, "environments": [], "cells": [{**CELL, "concurrency": 0}]}
        ),
        '{"made_with": {}, "prompts": [[1]], "answers": []}',
        '{"made_with": {}, "prompts": [[-1]], "answers": [[1]]}',
        '{"made_with": {}, "prompts": ["x"], "answers": [[1]]}',
    ],
    ids=lambda text: text[:40],
)
@pytest.mark.parametrize("kind", OF_JSON)
def test_json_of_another_kind(kind: str, text: str, tmp_path: Path) -> None:
    path = file_of(kind, tmp_path)
    path.write_text(text)
    refuse(kind, path)


def test_answers_are_of_the_vocabulary(tmp_path: Path) -> None:
    KINDS["answers"].write(path := file_of("answers", tmp_path))
    kept = read_answers(path)
    kept.check_vocabulary(4, path)
    with pytest.raises(BadFile, match="answers: 3 is outside the vocabulary of 3"):
        kept.check_vocabulary(3, path)


STEP = {"request": "r", "block": [0, 4], "step": 0, "writes": [[0, 3]]}


@pytest.mark.parametrize(
    "line",
    [
        {**STEP, "request": "other"},
        {**STEP, "request": 3},
        {**STEP, "block": [0, 10**12]},
        {**STEP, "block": [4, 0]},
        {**STEP, "block": [-4, 0]},
        {**STEP, "block": [0]},
        {**STEP, "step": -1},
        {**STEP, "step": "0"},
        {**STEP, "writes": [[4, 3]]},
        {**STEP, "writes": [[-1, 3]]},
        {**STEP, "writes": [[0]]},
        {**STEP, "writes": [["0", 3]]},
        {**STEP, "writes": 3},
        {"request": "r", "prompt": "text", "mask": 3},
        {"request": "r", "prompt": [1], "mask": None},
        [],
        3,
    ],
    ids=str,
)
def test_lines_of_a_log(line: Any, tmp_path: Path) -> None:
    KINDS["log"].write(path := file_of("log", tmp_path))
    with path.open("a") as log:
        log.write(json.dumps(line) + "\n")
    assert "line 3" in refuse("log", path)


def test_a_folder_of_logs_with_a_pipe_in_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / trajectories.PATTERN.replace("*", "x"))
    with pytest.raises(ValueError, match="it is a pipe"):
        list(trajectories.read(tmp_path))


def test_a_line_that_does_not_end(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("vllm_dlm.files.LINE_CHARACTERS", 100)
    path = tmp_path / "texts"
    path.write_text("x" * 99 + "\n" + "x" * 100 + "\n")
    with pytest.raises(BadFile, match="line 2 is longer than 100 characters"):
        list(read_lines(path, "texts"))


@pytest.mark.parametrize("text", ["3", '{"a": 1}', "[]", "[" * 100_000])
def test_prompts_that_are_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(ValueError, match="line 1"):
        load_prompts(path, None, 1, 0)  # type: ignore[arg-type]


# Folders of models ----------------------------------------------------------------


def write_model(folder: Path, layout: str) -> Callable[[Path], Any]:
    if layout == "llada":
        export(LLaDAModel(SHAPE), folder)
        return load_model
    export_llama(LlamaModel(SHAPE), folder)
    return load_llama


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", None),
        ("vocab_size", "11"),
        ("vocab_size", 12),
        ("vocab_size", 10**18),
        ("n_layers", 10**9),
        ("n_layers", 3),
        ("n_layers", -1),
        ("n_layers", True),
        ("d_model", 16.5),
        ("rope_theta", "inf"),
        ("rms_norm_eps", 0),
    ],
)
@pytest.mark.parametrize("layout", ["llada", "llama"])
def test_sizes_of_a_models_folder(
    layout: str, field: str, value: Any, tmp_path: Path
) -> None:
    read = write_model(tmp_path, layout)
    read(tmp_path)
    names = {"n_layers": "num_hidden_layers", "d_model": "hidden_size"}
    name = names.get(field, field) if layout == "llama" else field
    config = json.loads((tmp_path / "config.json").read_text())
    assert name in config
    write_json(tmp_path / "config.json", {**config, name: value})
    with pytest.raises(ValueError, match=str(tmp_path)):
        read(tmp_path)


@pytest.mark.parametrize("damage", [*EVERYWHERE, *WHOLE])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_files_of_a_models_folder(file: str, damage: Any, tmp_path: Path) -> None:
    read = write_model(tmp_path, "llada")
    damage(tmp_path / file)
    for load in (read, load_drafter):
        with pytest.raises(ValueError, match=str(tmp_path)):
            load(tmp_path)


def test_a_model_key_of_a_folder_with_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="it is a pipe"):
        weights_digest(tmp_path)


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


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o000])
@pytest.mark.parametrize("kind", set(KINDS) - {"released head", "pickled head"})
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
    with umask(0o000):
        TrajectoryLog(SimpleNamespace(), str(tmp_path))  # type: ignore[arg-type]
        TrajectoryLog(SimpleNamespace(), str(tmp_path))  # type: ignore[arg-type]
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


@pytest.mark.parametrize("kind", set(KINDS) - {"released head", "pickled head"})
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
    from vllm_dlm.training.teacher import load_tokenizer

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
