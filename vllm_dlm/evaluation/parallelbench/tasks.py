# SPDX-License-Identifier: Apache-2.0
"""ParallelBench's tasks: generated, or read from its published data.

Published are JSON lines with `messages` (a chat, an example in front) and a `label`:
the answer as a text or, where there are several, an object with what decides about it
(`_Label`). A line of results, which has such an object as its `doc`, is read as well.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

from pydantic import BaseModel

from vllm_dlm.evaluation.parallelbench import puzzles
from vllm_dlm.evaluation.parallelbench.lists import (
    LENGTHS,
    LIST_TASKS,
    ListTask,
    Problem,
    parsed,
    written,
)
from vllm_dlm.evaluation.parallelbench.text_metrics import measure_of
from vllm_dlm.evaluation.parallelbench.texts import TEXT_TASKS, Reference
from vllm_dlm.evaluation.tasks import Family, Question, Score, Task, TaskOptions
from vllm_dlm.files.whole_files import checked, parse_json, parse_lines

QUESTIONS = 100
LIST_TOKENS, TEXT_TOKENS = 32, 64
"""Widths of the published canvases."""

PUZZLES = ("latin_square", "sudoku")


class _Message(BaseModel):
    role: str
    content: str


class _Label(BaseModel):
    input: list[str] = []
    word: str = ""
    symbols: list[str] = []
    words: list[str] = []
    text: str = ""
    summary: str = ""


class _Doc(BaseModel):
    messages: list[_Message]
    label: str | _Label


Judge: TypeAlias = Callable[[str], bool]


@dataclass(frozen=True)
class _Item:
    """A question, with what judges its answer, or what it is compared with."""

    question: Question
    judge: Judge | Reference


def make(name: str, options: TaskOptions) -> Task:
    """A task of ParallelBench.

    Raises:
        ValueError: published data of another form; a metric that cannot be measured.
    """
    member = name.partition("/")[2]
    if name in options.data:
        items = _published(name, member, options)
    else:
        # Each task draws its own questions, whichever others there are.
        rng = random.Random(f"{name}-{options.seed}")
        count = options.limit or QUESTIONS
        items = [
            _generated(member, rng, LENGTHS[nth * len(LENGTHS) // count])
            for nth in range(count)
        ]
    if member in TEXT_TASKS:
        return _of_texts(name, member, items, options)
    return Task(
        name,
        [item.question for item in items],
        lambda texts: [
            float(cast(Judge, item.judge)(text))
            for item, text in zip(items, texts, strict=True)
        ],
        TEXT_TOKENS if member in PUZZLES else LIST_TOKENS,
        stop=("\n\n",),
    )


def _of_texts(
    name: str, member: str, items: Sequence[_Item], options: TaskOptions
) -> Task:
    """A task of free text, with those of the run's metrics that it has."""
    known = TEXT_TASKS[member].metrics
    asked = [metric for metric in options.text_metrics if metric in known]
    if not asked:
        raise ValueError(
            f"{name} has the metrics {', '.join(known)}: name one in --text-metrics"
        )
    against = [cast(Reference, item.judge) for item in items]

    def score_by(metric: str) -> Score:
        measure = measure_of(metric, member, options.language_tool)
        return lambda texts: measure(texts, against)

    scores = {metric: score_by(metric) for metric in asked}
    return Task(
        name,
        [item.question for item in items],
        scores[asked[0]],
        TEXT_TOKENS,
        stop=("\n\n",),
        metrics=scores,
    )


def _generated(member: str, rng: random.Random, length: int) -> _Item:
    """A question with a solved one in front, of any length."""
    if member == "latin_square":
        return _latin_square(rng)
    if member == "sudoku":
        return _sudoku(rng)
    if member in TEXT_TASKS:
        text_task = TEXT_TASKS[member]
        reference = text_task.draw(rng)
        return _Item(Question((text_task.ask(reference),)), reference)
    task = LIST_TASKS[member]
    problem = task.draw(rng, length)
    example = task.draw(rng, rng.choice(LENGTHS))
    turns = (
        task.question(example) + "\n",
        written(example.answer),
        task.question(problem) + "\n",
    )
    return _Item(Question(turns), partial(_list_is_right, task, problem))


def _list_is_right(task: ListTask, problem: Problem, text: str) -> bool:
    return task.is_right(problem, parsed(text))


def _latin_square(rng: random.Random) -> _Item:
    def asked(symbols: Sequence[str]) -> str:
        return (
            f"Write a Latin square of the {puzzles.SIZE} symbols {', '.join(symbols)}, "
            "a row in each line, cells divided by commas, and nothing else.\n"
        )

    example, symbols = puzzles.draw_symbols(rng), puzzles.draw_symbols(rng)
    turns = (asked(example), puzzles.draw_latin_square(rng, example), asked(symbols))
    return _Item(Question(turns), partial(puzzles.is_latin_square, symbols))


def _sudoku(rng: random.Random) -> _Item:
    def asked(grid: str) -> str:
        return (
            "Solve this Sudoku of 4 by 4 cells, in which a 0 is an empty cell. Answer "
            f"with the four rows alone.\n{grid}\n"
        )

    (given, answer), (grid, solution) = (
        puzzles.draw_sudoku(rng),
        puzzles.draw_sudoku(rng),
    )
    turns = (asked(given), answer, asked(grid))
    return _Item(Question(turns), partial(puzzles.is_sudoku, solution))


def _published(name: str, member: str, options: TaskOptions) -> list[_Item]:
    def parse(line: str) -> _Item:
        record: Any = parse_json(line)
        if isinstance(record, dict) and "doc" in record:
            record = record["doc"]
        doc = checked(_Doc, record)
        roles = [message.role for message in doc.messages]
        if roles[-1:] != ["user"] or roles != (["user", "assistant"] * 9)[: len(roles)]:
            raise ValueError("messages: expected user and assistant in turn, user last")
        turns = tuple(message.content for message in doc.messages)
        return _Item(Question(turns), _judge(member, doc.label))

    return parse_lines(options.data[name], name, parse, options.limit)


def _judge(member: str, label: str | _Label) -> Judge | Reference:
    """What decides about answers to a published question.

    Raises:
        ValueError: the label is one of another task.
    """
    if member == "sudoku" and isinstance(label, str):
        return partial(puzzles.is_sudoku, label)
    if member == "latin_square" and isinstance(label, _Label) and label.symbols:
        return partial(puzzles.is_latin_square, label.symbols)
    if member in TEXT_TASKS and isinstance(label, _Label):
        found = Reference(tuple(label.words), label.text, label.summary)
        needed = {"summarization": found.summary, "paraphrasing": found.text}
        if needed.get(member, found.words):
            return found
    if member in LIST_TASKS:
        task = LIST_TASKS[member]
        if isinstance(label, str):
            problem = Problem((), tuple(parsed(label)))
        else:
            problem = Problem(tuple(label.input), (), label.word)
        if bool(problem.names) == (member in FREE):
            return partial(_list_is_right, task, problem)
    raise ValueError(f"label: not that of a question of {member}")


FREE = ("shuffle", "insert_random", "remove_random", "replace_random")
"""Lists with several right answers."""

FAMILY = Family(
    make,
    (*LIST_TASKS, *PUZZLES, *TEXT_TASKS),
    groups={"": (*LIST_TASKS, *PUZZLES), "texts": tuple(TEXT_TASKS)},
    takes_data=True,
)
