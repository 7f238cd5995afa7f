# SPDX-License-Identifier: Apache-2.0
"""Rewards of reinforcement learning: built-in ones, and those in a user's file.

A reward is a function

    reward(prompts: list[str], texts: list[str], records: list[dict]) -> list[float]

of answers: the text of each up to its end, the prompt that it answers, and the record
(the line of the data) that the prompt comes from. It returns one number per text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

from vllm_dlm.files.python_files import callables_in, load_file
from vllm_dlm.messages import quote, unknown
from vllm_dlm.tasks.problems import TASKS, Problem

Record: TypeAlias = Mapping[str, Any]
Function: TypeAlias = Callable[
    [Sequence[str], Sequence[str], Sequence[Record]], Sequence[float]
]

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_BOX = "\\boxed{"
_INTERFACE = (
    "a reward is a function reward(prompts, texts, records) that returns a number "
    "for each text"
)


@dataclass(frozen=True)
class Reward:
    """A reward and its name, with what it returns checked."""

    name: str
    function: Function

    def __call__(
        self,
        prompts: Sequence[str],
        texts: Sequence[str],
        records: Sequence[Record],
    ) -> list[float]:
        """The reward of each text.

        Raises:
            ValueError: the function fails, or returns something else than one finite
                number per text; the message names the record where one is to blame.
        """
        try:
            found = self.function(list(prompts), list(texts), list(records))
        except Exception as error:
            where = self._first_to_fail(prompts, texts, records)
            raise ValueError(
                f"reward {self.name} failed on {where}: {type(error).__name__}: {error}"
            ) from error
        # Tensors and arrays.
        found = found.tolist() if hasattr(found, "tolist") else found
        if not isinstance(found, list | tuple):
            raise ValueError(
                f"reward {self.name} returned {quote(found)}, not a list: {_INTERFACE}"
            )
        if len(found) != len(texts):
            raise ValueError(
                f"reward {self.name} returned {len(found)} values for {len(texts)} "
                f"texts: {_INTERFACE}"
            )
        for index, value in enumerate(found):
            if not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(
                    f"reward {self.name} returned {quote(value)} for text {index} "
                    f"({quote(texts[index])}, of the record {quote(records[index])}), "
                    f"not a finite number: {_INTERFACE}"
                )
        return [float(value) for value in found]

    def _first_to_fail(
        self,
        prompts: Sequence[str],
        texts: Sequence[str],
        records: Sequence[Record],
    ) -> str:
        """Which text the function fails on if it is asked about that alone."""
        for prompt, text, record in zip(prompts, texts, records, strict=True):
            try:
                self.function([prompt], [text], [record])
            except Exception:
                return f"the text {quote(text)} of the record {quote(record)}"
        return f"{len(texts)} texts together, but on none of them alone"


def load_reward(name: str) -> Reward:
    """A built-in reward, or `FILE.py:NAME`, a function in a file.

    Raises:
        ValueError: there is none by that name; the message says what there is.
    """
    if name in REWARDS:
        return Reward(name, REWARDS[name])
    file, colon, function = name.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise ValueError(f"--reward: {unknown(name, REWARDS)}, or FILE.py:NAME")
    module = load_file(Path(file), "--reward")
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(
            f"--reward: {file} has no function {function!r}; it has "
            f"{', '.join(callables_in(module)) or 'none'}, and {_INTERFACE}"
        )
    return Reward(name, found)


def _for_each(right: Callable[[str, Record], bool]) -> Function:
    """The reward 1 for each text that is right, else 0."""

    def reward(
        prompts: Sequence[str], texts: Sequence[str], records: Sequence[Record]
    ) -> list[float]:
        pairs = zip(texts, records, strict=True)
        return [float(right(text, record)) for text, record in pairs]

    return reward


def _answer(record: Record) -> str:
    if "answer" not in record:
        raise ValueError('the record has no "answer"')
    return str(record["answer"])


def _solves(text: str, record: Record) -> bool:
    """Whether it answers a problem of `vllm_dlm.tasks`."""
    task = record.get("task")
    if task not in TASKS or "question" not in record:
        raise ValueError(
            'the reward tasks needs records with "task" (one of '
            f'{", ".join(TASKS)}), "question" and "answer"'
        )
    return Problem(task, record["question"], _answer(record)).check(text)


def _is_exact(text: str, record: Record) -> bool:
    return text.strip() == _answer(record).strip()


def _has_number(text: str, record: Record) -> bool:
    """Whether the last number of the text is the last one of the answer."""
    wanted = _last_number(_answer(record))
    if wanted is None:
        raise ValueError(f"the answer {quote(_answer(record))} has no number")
    return _last_number(text) == wanted


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", ""))
    except InvalidOperation:
        return None


def _is_boxed(text: str, record: Record) -> bool:
    r"""Whether the last `\boxed{...}` holds the answer, or what is boxed there."""
    answer = _answer(record)
    wanted = _last_boxed(answer) if _BOX in answer else answer
    found = _last_boxed(text)
    return found is not None and _squeezed(found) == _squeezed(wanted or "")


def _last_boxed(text: str) -> str | None:
    start = text.rfind(_BOX)
    if start < 0:
        return None
    depth = 1
    for end in range(start + len(_BOX), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return text[start + len(_BOX) : end]
    return None


def _squeezed(text: str) -> str:
    return "".join(text.split())


REWARDS: dict[str, Function] = {
    "tasks": _for_each(_solves),
    "exact": _for_each(_is_exact),
    "number": _for_each(_has_number),
    "boxed": _for_each(_is_boxed),
}
"""Built-in rewards: 1 for a right answer, else 0."""
