# SPDX-License-Identifier: Apache-2.0
"""Reading a trajectory log; `tests/engine/test_trajectories.py` writes some."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_dlm.config.options import DlmConfig
from vllm_dlm.trajectories import Step, Trajectory, read

ONE = {"request": "one", "prompt": [7, 8], "mask": 99}


def line(step: int, writes: list[list[int]], block: tuple[int, int] = (0, 4)) -> Any:
    return {"request": "one", "block": list(block), "step": step, "writes": writes}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def only(path: Path) -> Trajectory:
    (trajectory,) = read(path)
    return trajectory


def test_every_canvas_is_rebuilt(tmp_path: Path):
    """Written, overwritten, masked again, idle, and cut."""
    log = write(
        tmp_path / "trajectories-1.jsonl",
        ONE,
        line(0, [[1, 11], [2, 12]]),
        line(1, []),
        line(2, [[0, 10], [2, 99]]),
        line(3, [[1, 21], [2, 22], [3, 13]]),
        line(0, [[5, 15]], (4, 8)),
        line(1, [[4, 14]], (4, 6)),
    )
    trajectory = only(log)
    assert (trajectory.request, trajectory.prompt) == ("one", [7, 8])
    assert list(trajectory.steps()) == [
        Step(0, [99, 11, 12, 99], [1, 2]),
        Step(1, [99, 11, 12, 99], []),
        Step(2, [10, 11, 99, 99], [0, 2]),
        Step(3, [10, 21, 22, 13], [1, 2, 3]),
        Step(4, [10, 21, 22, 13, 99, 15, 99, 99], [5]),
        Step(5, [10, 21, 22, 13, 14, 15], [4]),
    ]


def test_a_replayed_block_counts_once(tmp_path: Path):
    """The seed of the second block, its step 0, is not repeated."""
    log = write(
        tmp_path / "trajectories-1.jsonl",
        ONE,
        line(0, [[0, 10], [1, 11]], (0, 2)),
        line(0, [[2, 12]], (2, 5)),
        line(1, [[4, 14]], (2, 5)),
        ONE,
        line(1, [[4, 14]], (2, 5)),
        line(2, [[3, 13]], (2, 5)),
    )
    assert [step.changed for step in only(log).steps()] == [[0, 1], [2], [4], [3]]
    assert list(only(log).steps())[-1].canvas == [10, 11, 12, 13, 14]


def test_a_folder_is_all_its_files(tmp_path: Path):
    for name in ("b", "a"):
        write(tmp_path / f"trajectories-{name}.jsonl", {**ONE, "request": name})
    write(tmp_path / "other.jsonl", {})
    assert [trajectory.request for trajectory in read(tmp_path)] == ["a", "b"]


def test_what_is_not_a_log(tmp_path: Path):
    log = write(tmp_path / "log", ONE, {"request": "two", "step": 0})
    with pytest.raises(ValueError, match="line 2: not a line of a trajectory log"):
        list(read(log))
    log.write_text(json.dumps(ONE) + "\n" + '{"request": "on')
    assert list(only(log).steps()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    where = {"trajectory_dir": str(tmp_path / "file" / "log")}
    with pytest.raises(ValueError, match="name a folder that the server may write to"):
        DlmConfig.from_mapping(where, where="here")
    folder = tmp_path / "new" / "log"
    DlmConfig.from_mapping({"trajectory_dir": str(folder)}, where="here")
    assert folder.is_dir()
    assert not list(folder.iterdir())
