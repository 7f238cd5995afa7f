# SPDX-License-Identifier: Apache-2.0
"""Broken files of every kind end in one ValueError that names file and field."""

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from files.file_kinds import (
    CELL,
    EVERYWHERE,
    KINDS,
    LINES,
    OF_JSON,
    TENSORS,
    WHOLE,
    a_folder,
    a_sparse_giant,
    declares_terabytes,
    deep_header,
    file_of,
    huge_header,
    no_file,
    short,
)
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_dlm import trajectories
from vllm_dlm.files.whole_files import (
    BadFile,
    read_lines,
)
from vllm_dlm.training.drafters.teacher import load_prompts, read_answers

# Opening a pipe, or counting to 99999999, would take for ever.
pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(kind: str, tmp_path: Path) -> None:
    path = file_of(kind, tmp_path)
    KINDS[kind].write(path)
    KINDS[kind].read(path)


# Reading --------------------------------------------------------------------------


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
    ids=lambda state: type(state).__name__,
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
    monkeypatch.setattr("vllm_dlm.files.whole_files.LINE_CHARACTERS", 100)
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
