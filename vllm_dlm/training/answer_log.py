# SPDX-License-Identifier: Apache-2.0
"""Answers that a model has given so far, in a file that a run goes on with.

The first line says which command the answers are of, each further one is an `Answer`.
Lines are appended as answers come, so that an interrupted run loses little.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vllm_dlm.files.whole_files import (
    BadFile,
    checked,
    make_folder,
    parse_json,
    read_lines,
    replacing,
)

_WHAT = "answers"


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt."""

    prompt_ids: list[int]
    response_ids: list[int]
    """Up to and with the end of the text, if there is one."""
    right: bool | None = None
    """Whether it is right; None where no program can say so."""
    steps: list[int] | None = None
    """The denoise step that wrote each token of the response; None if nobody asked."""


class _Line(BaseModel):
    """An `Answer`, as a line of the file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt_ids: list[int]
    response_ids: list[int]
    right: bool | None
    steps: list[int] | None


def append_answers(
    path: Path, command: Mapping[str, Any], answers: Sequence[Answer]
) -> None:
    """Append answers to a file, which is made if there is none.

    Args:
        path: The file.
        command: What the answers follow from; values of JSON.
        answers: The next ones.
    """
    lines = [json.dumps(asdict(answer)) for answer in answers]
    if not path.exists():
        make_folder(path.parent)
        lines.insert(0, json.dumps(command))
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def read_answers(path: Path, command: Mapping[str, Any]) -> list[Answer]:
    """The answers of a file, none where there is no file.

    A last line that was cut short is taken away.

    Raises:
        ValueError: they follow from another command, or a line is no answer.
    """
    if not path.exists():
        return []
    lines = list(read_lines(path, _WHAT))
    if lines and not lines[-1].endswith("\n"):
        del lines[-1]
        with replacing(path) as file:
            file.write_text("".join(lines), encoding="utf-8")
    if not lines:
        path.unlink()
        return []
    try:
        first, *rest = [parse_json(line) for line in lines]
        answers = [Answer(**checked(_Line, line).model_dump()) for line in rest]
    except ValueError as error:
        raise BadFile(_WHAT, path, error) from None
    if first != command:
        raise BadFile(
            _WHAT,
            path,
            "they were made with other options; remove the file, or write elsewhere",
        )
    return answers
