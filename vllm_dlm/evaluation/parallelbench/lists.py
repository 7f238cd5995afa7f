# SPDX-License-Identifier: Apache-2.0
"""The ten tasks about a line of people: how each is drawn, and who is right.

Four have several right answers, so that names depend on each other given the question:
`shuffle`, `insert_random`, `remove_random`, `replace_random`. The others have one.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_dlm.tasks.problems import NAMES as FIRST_NAMES

LAST_NAMES = (
    "Abbott Baker Castle Dahl Engel Fischer Garcia Hansen Ibsen Jones Keller Lopez "
    "Meyer Novak Olsen Porter Quinn Rossi Sato Turner Ulrich Vance Weber Xenakis Young "
    "Zimmer Andrade Bianchi Cohen Dubois Eklund Ferrari Gupta Hughes Ivanov Jansen Kim "
    "Larsen Moreau Nilsen Ortega Palmer Reyes Silva Thomas Vargas Walsh Yilmaz"
).split()
LENGTHS = (3, 4, 5, 6)


@dataclass(frozen=True)
class Problem:
    """A question about a list, and one of its right answers."""

    names: tuple[str, ...]
    """The list in the question."""
    answer: tuple[str, ...]
    word: str = ""
    """The name that comes in."""
    index: int | None = None
    """Counted from 0."""


@dataclass(frozen=True)
class ListTask:
    """One of the ten tasks."""

    ask: str
    """The question's last sentence; `{word}` and `{index}` are the problem's."""
    answer: Callable[[random.Random, list[str], str, int], list[str]]
    """A right answer, of names, the new one, and a place."""
    is_right: Callable[[Problem, list[str]], bool]
    takes_word: bool = False
    takes_index: bool = False
    goes_behind: bool = False
    """Whether the place may be one behind the last."""

    def draw(self, rng: random.Random, length: int) -> Problem:
        """A problem about so many names; no last name comes twice."""
        first = rng.sample(FIRST_NAMES, length + 1)
        last = rng.sample(LAST_NAMES, length + 1)
        *names, word = (f"{a} {b}" for a, b in zip(first, last, strict=True))
        index = rng.randrange(length + self.goes_behind)
        return Problem(
            tuple(names),
            tuple(self.answer(rng, names, word, index)),
            word if self.takes_word else "",
            index if self.takes_index else None,
        )

    def question(self, problem: Problem) -> str:
        """The question, in words."""
        ask = self.ask.format(word=problem.word, index=problem.index)
        return (
            "Some people stand in line at a counter, the first in front:\n"
            f"{written(problem.names)}\n{ask} Answer with the list alone."
        )


def written(names: Sequence[str]) -> str:
    """A list as questions and answers have it."""
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"


def parsed(text: str) -> list[str]:
    """The last list in a text, read leniently, as published."""
    inside = text.rpartition("[")[2].partition("]")[0]
    names = (part.strip().strip('"').strip() for part in inside.split(","))
    return [name for name in names if name]


def _exact(problem: Problem, found: list[str]) -> bool:
    return found == list(problem.answer)


def _shuffled(problem: Problem, found: list[str]) -> bool:
    names = list(problem.names)
    return Counter(found) == Counter(names) and found != names


def _inserted(problem: Problem, found: list[str]) -> bool:
    left = [name for name in found if name != problem.word]
    return found.count(problem.word) == 1 and left == list(problem.names)


def _removed(problem: Problem, found: list[str]) -> bool:
    names = list(problem.names)
    return any(found == names[:i] + names[i + 1 :] for i in range(len(names)))


def _replaced(problem: Problem, found: list[str]) -> bool:
    names, word = list(problem.names), problem.word
    return any(found == names[:i] + [word] + names[i + 1 :] for i in range(len(names)))


def _shuffle(rng: random.Random, names: list[str], word: str, index: int) -> list[str]:
    order = list(names)
    while order == names:
        rng.shuffle(order)
    return order


LIST_TASKS = {
    "copy": ListTask("Copy the list.", lambda r, n, w, i: n, _exact),
    "reverse": ListTask("Turn the line around.", lambda r, n, w, i: n[::-1], _exact),
    "sort": ListTask(
        "Sort it by last names, in alphabetical order.",
        lambda r, n, w, i: sorted(n, key=lambda name: name.split()[1]),
        _exact,
    ),
    "shuffle": ListTask("Put them into any other order.", _shuffle, _shuffled),
    "insert_index": ListTask(
        'Let "{word}" in at index {index}, counted from 0.',
        lambda r, n, w, i: [*n[:i], w, *n[i:]],
        _exact,
        takes_word=True,
        takes_index=True,
        goes_behind=True,
    ),
    "insert_random": ListTask(
        'Let "{word}" in, at any place.',
        lambda r, n, w, i: [*n[:i], w, *n[i:]],
        _inserted,
        takes_word=True,
        goes_behind=True,
    ),
    "remove_index": ListTask(
        "Take out the person at index {index}, counted from 0.",
        lambda r, n, w, i: n[:i] + n[i + 1 :],
        _exact,
        takes_index=True,
    ),
    "remove_random": ListTask(
        "Take out any one of them.",
        lambda r, n, w, i: n[:i] + n[i + 1 :],
        _removed,
    ),
    "replace_index": ListTask(
        'Put "{word}" in the place of the person at index {index}, counted from 0.',
        lambda r, n, w, i: [*n[:i], w, *n[i + 1 :]],
        _exact,
        takes_word=True,
        takes_index=True,
    ),
    "replace_random": ListTask(
        'Put "{word}" in the place of any one of them.',
        lambda r, n, w, i: [*n[:i], w, *n[i + 1 :]],
        _replaced,
        takes_word=True,
    ),
}
