# SPDX-License-Identifier: Apache-2.0
"""The trajectory log: every canvas that a request went through.

A server with `--dlm-trajectory-dir FOLDER` appends one JSON line per request and
denoise step to a file of its own in that folder, right after the step:

    {"request": ID, "prompt": [...], "mask": 126336}          when it is (re-)admitted
    {"request": ID, "block": [16, 32], "step": 0, "writes": [[17, 421], [20, 9]]}

A request that brings a canvas (docs/canvas.md) has "pins" in its first line: the
positions that it has written itself, each with its token.

`block` is the active block, `[first, end)` in output tokens; its end is where the
canvas ends if that is cut. `step` counts the block's steps. `writes` are the
positions (in output tokens) that the step wrote, overwrote or masked again, each with
the token it holds then. A preempted request goes through its block once more: its
lines replace those of the same block and step, and all after them.
`model_executor/sampling/trajectory_log.py` writes them. They hold texts: the file is
for its owner alone, and so is the folder if it was made for it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

from vllm_dlm.files.whole_files import checked, make_folder, parse_json, read_lines

PATTERN = "trajectories-*.jsonl"

LONGEST_OUTPUT = 1 << 22
"""Positions that a log may speak of: a step is read into a list of them."""

_Position = Annotated[int, Field(ge=0, le=LONGEST_OUTPUT)]
_Token = Annotated[int, Field(ge=0)]


class _Admission(BaseModel):
    """The line of a request that is admitted."""

    model_config = ConfigDict(strict=True)

    request: str
    prompt: Annotated[list[_Token], FailFast()]
    mask: _Token
    pins: Annotated[
        list[Annotated[list[_Token], Field(min_length=2, max_length=2)]], FailFast()
    ] = []


class StepLine(BaseModel):
    """The line of a request's step."""

    model_config = ConfigDict(strict=True)

    request: str
    block: Annotated[list[_Position], Field(min_length=2, max_length=2)]
    step: _Position
    writes: Annotated[
        list[Annotated[list[_Token], Field(min_length=2, max_length=2)]], FailFast()
    ]

    @model_validator(mode="after")
    def _check_positions(self) -> Self:
        first, end = self.block
        if first > end:
            raise ValueError(f"block: expected [first, end), got {self.block}")
        for position, _ in self.writes:
            if position >= end:
                raise ValueError(f"writes: {position} is behind the block's end {end}")
        return self


def check_folder(folder: str, *, where: str) -> None:
    """Make the folder of a trajectory log.

    Args:
        where: names the source in error messages.

    Raises:
        ValueError: no file can be written there.
    """
    try:
        make_folder(Path(folder).expanduser(), private=True)
        with tempfile.TemporaryFile(dir=Path(folder).expanduser()):
            pass
    except OSError as error:
        raise ValueError(
            f"{where}: trajectory_dir: cannot write to {folder!r} "
            f"({error.strerror}); name a folder that the server may write to"
        ) from None


@dataclass(frozen=True)
class Step:
    """One denoise step of a request."""

    number: int
    """From 0 over the whole request, as in a step map."""
    canvas: list[int]
    """Output tokens after the step, up to the active block's end; the mask id where
    nothing is written."""
    changed: list[int]
    """Positions of `canvas` that the step wrote, overwrote or masked again."""


@dataclass
class Trajectory:
    """One request of a log."""

    request: str
    """The engine's id: it holds the id of the answer."""
    prompt: list[int]
    mask: int
    """The mask id."""
    pins: dict[int, int] = field(default_factory=dict)
    """Positions of the output that the request has written itself, and their tokens."""
    blocks: dict[int, list[StepLine]] = field(default_factory=dict, repr=False)
    """First position of each block -> its lines, one per step."""

    def steps(self) -> Iterator[Step]:
        """All steps, first to last."""
        canvas: list[int] = []
        number = 0
        for _, lines in sorted(self.blocks.items()):
            for line in lines:
                end = line.block[1]
                new = range(len(canvas), end)
                canvas = canvas[:end] + [self.pins.get(i, self.mask) for i in new]
                for position, token in line.writes:
                    canvas[position] = token
                changed = [position for position, _ in line.writes]
                yield Step(number, list(canvas), changed)
                number += 1

    def add(self, line: StepLine) -> None:
        """Take in a step's line."""
        lines = self.blocks.setdefault(line.block[0], [])
        # Of a preempted request, the block's last run counts.
        del lines[line.step :]
        lines.append(line)


def read(path: str | os.PathLike[str]) -> Iterator[Trajectory]:
    """The requests of a log, in the order of their admission.

    Args:
        path: a file of the log, or the folder, for all of its files.

    Raises:
        ValueError: there is no such file, or a line is none of a trajectory log; the
            last one of a file may be cut short, as it is while it is written.
    """
    path = Path(path)
    for file in sorted(path.glob(PATTERN)) if path.is_dir() else [path]:
        yield from _read_file(file).values()


def _read_file(file: Path) -> dict[str, Trajectory]:
    found: dict[str, Trajectory] = {}
    for number, text in enumerate(read_lines(file, "trajectory log"), start=1):
        if not text.endswith("\n"):
            break
        try:
            line = parse_json(text)
            if isinstance(line, dict) and "prompt" in line:
                begin = checked(_Admission, line)
                pins = {position: token for position, token in begin.pins}
                known = Trajectory(begin.request, begin.prompt, begin.mask, pins)
                found.setdefault(begin.request, known)
                continue
            step = checked(StepLine, line)
            if step.request not in found:
                raise ValueError(f"request {step.request[:80]!r} was not admitted")
            found[step.request].add(step)
        except ValueError as error:
            raise ValueError(
                f"{file}, line {number}: not a line of a trajectory log ({error})"
            ) from None
    return found
