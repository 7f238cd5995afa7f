# SPDX-License-Identifier: Apache-2.0
"""Tasks of `vllm-dlm eval`: questions, and how many answers are right.

`TASKS` maps names to functions that make a task of a run's options. A name with a slash
is one of a family, whose own name stands for all of them where the family says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from vllm_dlm.evaluation.sandbox import Sandbox
from vllm_dlm.messages import quote
from vllm_dlm.registry import load


@dataclass(frozen=True)
class Question:
    """What a model is asked: turns of a chat, the last one the user's."""

    turns: tuple[str, ...]
    """User and assistant in turn; what comes before the last one is an example."""

    def messages(self) -> list[dict[str, str]]:
        """As chat messages."""
        roles = ("user", "assistant")
        return [
            {"role": roles[index % 2], "content": turn.strip()}
            for index, turn in enumerate(self.turns)
        ]

    def text(self) -> str:
        """As plain text: examples stand in front, a blank line between them."""
        pairs = [
            self.turns[index] + self.turns[index + 1]
            for index in range(0, len(self.turns) - 1, 2)
        ]
        return "\n\n".join([*pairs, self.turns[-1]])


Score: TypeAlias = Callable[[Sequence[str]], Sequence[float]]
"""From the answers' texts, in the order of the questions, to 0 to 1 for each."""


@dataclass(frozen=True)
class Task:
    """Questions, and how answers are judged."""

    name: str
    questions: Sequence[Question]
    score: Score
    max_tokens: int
    """Most tokens of an answer, which is the width of its canvas, unless asked
    otherwise."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer where the question is no chat."""
    metrics: Mapping[str, Score] = field(default_factory=dict)
    """Further measures of the answers, by name; where there are some, `score` is the
    first of them."""


@dataclass(frozen=True)
class TaskOptions:
    """What a run asks of its tasks."""

    limit: int | None = None
    """Most questions of each."""
    seed: int = 0
    """Of questions that are generated."""
    shots: int | None = None
    """Solved examples in front of each question; None is the task's own number."""
    data: Mapping[str, Path] = field(default_factory=dict)
    """Name of a task -> file of its questions."""
    sandbox: Sandbox | None = None
    """Where generated programs run; None where they may not."""
    text_metrics: tuple[str, ...] = ("grammar",)
    """What is measured of free text, the task's accuracy first."""
    language_tool: str | None = None
    """Address of a LanguageTool server."""

    def file_of(self, task: str, what: str) -> Path:
        """The file of a task that cannot do without.

        Raises:
            ValueError: there is none; the message says what it is.
        """
        if task not in self.data:
            raise ValueError(f"{task} needs its questions: --data {task}=FILE, {what}")
        return self.data[task]

    def sandbox_of(self, task: str) -> Sandbox:
        """Where a task's programs run.

        Raises:
            ValueError: they may not.
        """
        if self.sandbox is None:
            raise ValueError(
                f"{task} runs programs that the model has written: allow that with "
                "--allow-code (docs/evaluation.md says what they can do)"
            )
        return self.sandbox


Maker: TypeAlias = Callable[[str, TaskOptions], Task]

FAMILIES = {
    "tiny": "vllm_dlm.evaluation.tiny:FAMILY",
    "parallelbench": "vllm_dlm.evaluation.parallelbench.tasks:FAMILY",
    "gsm8k": "vllm_dlm.evaluation.gsm8k:FAMILY",
    "mbpp": "vllm_dlm.evaluation.code_tasks:MBPP",
    "humaneval": "vllm_dlm.evaluation.code_tasks:HUMANEVAL",
}
"""Name -> where its `Family` is."""


@dataclass(frozen=True)
class Family:
    """Tasks that are made alike."""

    make: Maker
    members: tuple[str, ...] = ()
    """Names behind the slash."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Further names behind the slash, each for several members. One of "" is the
    family's own name, which else is a task of its own."""
    takes_data: bool = False
    takes_shots: bool = False


def family_of(name: str) -> Family:
    """The family of a task.

    Raises:
        ValueError: no such task; the message names those there are.
    """
    family, slash, member = name.partition("/")
    if family not in FAMILIES:
        raise ValueError(
            f"{quote(family)} is no task: choose of {', '.join(FAMILIES)}, or "
            "lm-eval:NAME"
        )
    found: Family = load(FAMILIES[family])
    named = (*found.members, *filter(None, found.groups))
    if slash and member not in named:
        raise ValueError(
            f"{family} has no {quote(member)}; it has "
            f"{', '.join(named) or 'no tasks of its own names'}"
        )
    return found


def expanded(names: Sequence[str]) -> list[str]:
    """Names of single tasks, each once, in their order.

    Raises:
        ValueError: as `family_of`.
    """
    single: dict[str, None] = {}
    for name in names:
        family, _, member = name.partition("/")
        members = family_of(name).groups.get(member)
        alone = [name] if members is None else [f"{family}/{one}" for one in members]
        single |= dict.fromkeys(alone)
    return list(single)


def make_tasks(names: Sequence[str], options: TaskOptions) -> list[Task]:
    """Tasks by name.

    Raises:
        ValueError: no such task, or options that it cannot work with.
    """
    for name in options.data:
        _check_takes("--data", "takes_data", name)
        if name not in names:
            raise ValueError(
                f"--data {name}=...: --tasks does not name {name} (a file is of one "
                "task: parallelbench/shuffle=FILE)"
            )
    for name in names if options.shots is not None else ():
        _check_takes("--shots", "takes_shots", name)
    tasks = []
    for name in names:
        task = family_of(name).make(name, options)
        if not task.questions:
            raise ValueError(f"{name}: there is no question")
        tasks.append(task)
    return tasks


def _check_takes(option: str, field: str, name: str) -> None:
    if not getattr(family_of(name), field):
        able = [one for one in FAMILIES if getattr(family_of(one), field)]
        raise ValueError(f"{option}: not for {name}, but for {', '.join(able)}")
