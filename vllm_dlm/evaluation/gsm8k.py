# SPDX-License-Identifier: Apache-2.0
"""GSM8K (arXiv 2110.14168), from a file in its published form.

JSON lines with a `question` and an `answer`, whose last line is `#### NUMBER`. Examples
are the file's first lines, and are not asked.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from pydantic import BaseModel

from vllm_dlm.evaluation.tasks import Family, Question, Task, TaskOptions
from vllm_dlm.files.whole_files import checked, parse_json, parse_lines

MAX_TOKENS = 256
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Record(BaseModel):
    """A line of the file."""

    question: str
    answer: str


def make(name: str, options: TaskOptions) -> Task:
    """Word problems whose answer is a number."""
    path = options.file_of(name, "JSON lines with a `question` and an `answer`")
    shots = options.shots or 0
    most = None if options.limit is None else options.limit + shots
    records = parse_lines(
        path, name, lambda line: checked(Record, parse_json(line)), most
    )
    examples = [
        turn
        for record in records[:shots]
        for turn in (_asked(record), f" {record.answer}")
    ]
    asked = records[shots:]
    wanted = [number_of(record.answer) for record in asked]
    if None in wanted:
        line = wanted.index(None) + shots + 1
        raise ValueError(f"{path}, line {line}: the answer has no number")
    return Task(
        name,
        [Question((*examples, _asked(record))) for record in asked],
        lambda texts: [
            float(number_of(text) == right)
            for text, right in zip(texts, wanted, strict=True)
        ],
        MAX_TOKENS,
        # Where it goes on with a question of its own.
        stop=("Question:",),
    )


def _asked(record: Record) -> str:
    return (
        f"Question: {record.question}\nReason step by step, and end with a line that "
        "says #### and the number.\nAnswer:"
    )


def number_of(text: str) -> Decimal | None:
    """The number behind the last `####`, or else the last one there is."""
    behind = text.rpartition("####")[2]
    found = NUMBER.findall(behind) if "####" in text else []
    numbers = found[:1] or NUMBER.findall(text)[-1:]
    try:
        return Decimal(numbers[0].replace(",", "")) if numbers else None
    except InvalidOperation:
        return None


FAMILY = Family(make, takes_data=True, takes_shots=True)
