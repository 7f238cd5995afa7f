# SPDX-License-Identifier: Apache-2.0
"""The trajectory log: every canvas that a request went through.

A server with `--dlm-trajectory-dir FOLDER` appends one JSON line per request and
denoise step to a file of its own in that folder, right after the step:

    {"request": ID, "prompt": [...], "mask": 126336}          when it is (re-)admitted
    {"request": ID, "block": [16, 32], "step": 0, "writes": [[17, 421], [20, 9]]}

`block` is the active block, `[first, end)` in output tokens; its end is where the
canvas ends if that is cut. `step` counts the block's steps. `writes` are the
positions (in output tokens) that the step wrote, overwrote or masked again, each with
the token it holds then. A preempted request goes through its block once more: its
lines replace those of the same block and step, and all after them.
`model_executor/trajectory_log.py` writes them.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATTERN = "trajectories-*.jsonl"


def check_folder(folder: str, *, where: str) -> None:
    """Make the folder of a trajectory log.

    Args:
        where: names the source in error messages.

    Raises:
        ValueError: no file can be written there.
    """
    try:
        Path(folder).expanduser().mkdir(parents=True, exist_ok=True)
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
    blocks: dict[int, list[dict[str, Any]]] = field(default_factory=dict, repr=False)
    """First position of each block -> its lines, one per step."""

    def steps(self) -> Iterator[Step]:
        """All steps, first to last."""
        canvas: list[int] = []
        number = 0
        for _, lines in sorted(self.blocks.items()):
            for line in lines:
                end = line["block"][1]
                canvas = canvas[:end] + [self.mask] * (end - len(canvas))
                for position, token in line["writes"]:
                    canvas[position] = token
                changed = [position for position, _ in line["writes"]]
                yield Step(number, list(canvas), changed)
                number += 1

    def add(self, line: Mapping[str, Any]) -> None:
        """Take in a step's line."""
        lines = self.blocks.setdefault(line["block"][0], [])
        # Of a preempted request, the block's last run counts.
        del lines[line["step"] :]
        lines.append(dict(line))


def read(path: str | os.PathLike[str]) -> Iterator[Trajectory]:
    """The requests of a log, in the order of their admission.

    Args:
        path: a file of the log, or the folder, for all of its files.

    Raises:
        ValueError: a line is none of a trajectory log; the last one of a file may be
            cut short, as it is while it is written.
    """
    path = Path(path)
    for file in sorted(path.glob(PATTERN)) if path.is_dir() else [path]:
        yield from _read_file(file).values()


def _read_file(file: Path) -> dict[str, Trajectory]:
    found: dict[str, Trajectory] = {}
    with file.open(encoding="utf-8") as lines:
        for number, text in enumerate(lines, start=1):
            if not text.endswith("\n"):
                break
            try:
                line = json.loads(text)
                request = line["request"]
                if "prompt" in line:
                    known = Trajectory(request, line["prompt"], line["mask"])
                    found.setdefault(request, known)
                else:
                    found[request].add(line)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file}, line {number}: not a line of a trajectory log ({error!r})"
                ) from None
    return found
