# SPDX-License-Identifier: Apache-2.0
"""Generated tasks with checkable answers, in the manner of ParallelBench.

Most tasks have one right answer; the ones of `FREE_TASKS` have several, so that
the answer's tokens depend on each other given the question (arXiv 2510.04767).
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

NAMES = (
    "Ada Amir Ben Bela Carl Cleo Dan Dora Emil Eva Finn Flora Gus Gwen Hana Hugo "
    "Ida Ivan Jack June Karl Kira Lena Liam Mara Milo Nina Noah Olga Otto Paul "
    "Petra Rosa Rudi Sara Sven Tara Theo Uma Vera"
).split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MIN_NAMES, MAX_NAMES = 3, 5
MIN_LETTERS, MAX_LETTERS = 3, 8

# One question in HELD_OUT_PARTS is kept for evaluation.
HELD_OUT_PARTS = 16


@dataclass(frozen=True)
class Problem:
    """A question with one right answer among those that `check` accepts."""

    task: str
    question: str
    answer: str

    def check(self, text: str) -> bool:
        """True if `text` (special tokens removed) is a right answer."""
        return TASKS[self.task].check(self, text)


@dataclass(frozen=True)
class Task:
    """A generator of (question, answer) pairs and the checker of its answers.

    Args:
        name: Name of the task.
        weight: Share of the task among the sampled problems.
        generate: Draws a question and a right answer.
        check: Decides whether a text answers a problem of this task.
    """

    name: str
    weight: float
    generate: Callable[[random.Random], tuple[str, str]]
    check: Callable[[Problem, str], bool]


def format_list(names: Sequence[str]) -> str:
    """Write names as `[Ada, Ben]`."""
    return f"[{', '.join(names)}]"


def parse_list(text: str) -> list[str] | None:
    """Read a text of the form `[Ada, Ben]`; None if it has another form."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    return text[1:-1].split(", ")


def is_held_out(question: str) -> bool:
    """True for the questions kept for evaluation, the same on every machine."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_PARTS == 0


def sample_problem(
    rng: random.Random, split: str = "train", tasks: Sequence[str] | None = None
) -> Problem:
    """Draw one problem of a split ("train" or "heldout").

    Args:
        rng: Source of randomness.
        split: "train" or "heldout"; no question is in both.
        tasks: Names of the tasks to draw from, all of them by default.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', not {split!r}")
    if tasks is not None and (unknown := set(tasks) - set(TASKS)):
        raise ValueError(f"unknown tasks {sorted(unknown)}; known: {list(TASKS)}")
    chosen = list(TASKS.values()) if tasks is None else [TASKS[t] for t in tasks]
    [task] = rng.choices(chosen, weights=[task.weight for task in chosen])
    while True:
        question, answer = task.generate(rng)
        if is_held_out(question) == (split == "heldout"):
            return Problem(task.name, question, answer)


def iter_problems(
    seed: int, split: str = "train", tasks: Sequence[str] | None = None
) -> Iterator[Problem]:
    """Endless stream of problems; the same for the same arguments."""
    rng = random.Random(f"{split}-{seed}")
    while True:
        yield sample_problem(rng, split, tasks)


def sample_problems(
    num: int, seed: int, split: str = "train", tasks: Sequence[str] | None = None
) -> list[Problem]:
    """Draw `num` problems with different questions.

    Args:
        num: How many problems.
        seed: The same seed gives the same problems.
        split: "train" or "heldout"; no question is in both.
        tasks: Names of the tasks to draw from, all of them by default.
    """
    problems: dict[str, Problem] = {}
    stream = iter_problems(seed, split, tasks)
    while len(problems) < num:
        problem = next(stream)
        problems.setdefault(problem.question, problem)
    return list(problems.values())


def check(problem: Problem, text: str) -> bool:
    """True if `text` (special tokens removed) is a right answer of a problem."""
    return problem.check(text)


def _draw_names(rng: random.Random, extra: int = 0) -> tuple[list[str], list[str]]:
    """A list of names and `extra` names that are not in it."""
    count = rng.randint(MIN_NAMES, MAX_NAMES)
    names = rng.sample(NAMES, count + extra)
    return names[:count], names[count:]


def _copy(rng: random.Random) -> tuple[str, str]:
    names, _ = _draw_names(rng)
    return f"Copy {format_list(names)}", format_list(names)


def _reverse(rng: random.Random) -> tuple[str, str]:
    names, _ = _draw_names(rng)
    return f"Reverse {format_list(names)}", format_list(names[::-1])


def _sort(rng: random.Random) -> tuple[str, str]:
    names, _ = _draw_names(rng)
    return f"Sort {format_list(names)}", format_list(sorted(names))


def _insert(rng: random.Random) -> tuple[str, str]:
    names, [new] = _draw_names(rng, extra=1)
    place = rng.randrange(len(names))
    answer = [*names[: place + 1], new, *names[place + 1 :]]
    question = f"Insert {new} after {names[place]} in {format_list(names)}"
    return question, format_list(answer)


def _remove(rng: random.Random) -> tuple[str, str]:
    names, _ = _draw_names(rng)
    place = rng.randrange(len(names))
    answer = names[:place] + names[place + 1 :]
    return f"Remove {names[place]} from {format_list(names)}", format_list(answer)


def _replace(rng: random.Random) -> tuple[str, str]:
    names, [new] = _draw_names(rng, extra=1)
    place = rng.randrange(len(names))
    answer = [*names[:place], new, *names[place + 1 :]]
    question = f"Replace {names[place]} with {new} in {format_list(names)}"
    return question, format_list(answer)


def _add(rng: random.Random) -> tuple[str, str]:
    left, right = rng.randint(10, 99), rng.randint(10, 99)
    ones = left % 10 + right % 10
    tens = left // 10 + right // 10 + ones // 10
    # The sums of the digits always take two digits: the steps keep their places.
    steps = (
        f"{left % 10}+{right % 10}={ones:02d}, "
        f"{left // 10}+{right // 10}+{ones // 10}={tens:02d}"
    )
    return f"Add {left}+{right}", f"{steps}, {left + right}"


def _spell(rng: random.Random) -> tuple[str, str]:
    word = "".join(rng.choices(LETTERS, k=rng.randint(MIN_LETTERS, MAX_LETTERS)))
    return f"Spell {word} backwards", word[::-1]


def _shuffle(rng: random.Random) -> tuple[str, str]:
    names, _ = _draw_names(rng)
    answer = list(names)
    while answer == names:
        rng.shuffle(answer)
    return f"Shuffle {format_list(names)}", format_list(answer)


def _insert_any(rng: random.Random) -> tuple[str, str]:
    names, [new] = _draw_names(rng, extra=1)
    place = rng.randint(0, len(names))
    answer = [*names[:place], new, *names[place:]]
    return f"Insert {new} anywhere in {format_list(names)}", format_list(answer)


def _replace_any(rng: random.Random) -> tuple[str, str]:
    names, [new] = _draw_names(rng, extra=1)
    place = rng.randrange(len(names))
    answer = [*names[:place], new, *names[place + 1 :]]
    return f"Replace any name with {new} in {format_list(names)}", format_list(answer)


def _check_exact(problem: Problem, text: str) -> bool:
    return text.strip() == problem.answer


def _check_add(problem: Problem, text: str) -> bool:
    """Only the sum counts, not the steps written before it."""
    return text.strip().split(", ")[-1] == problem.answer.split(", ")[-1]


def list_of_question(problem: Problem) -> list[str]:
    """The names in the list that a question ends with."""
    start = problem.question.index("[")
    return problem.question[start + 1 : -1].split(", ")


def new_name(problem: Problem) -> str:
    """The name that `insert_any` and `replace_any` put into the list."""
    before = "Insert " if problem.task == "insert_any" else " with "
    return problem.question.split(before)[1].split(" ")[0]


def _check_shuffle(problem: Problem, text: str) -> bool:
    names, found = list_of_question(problem), parse_list(text)
    if found is None:
        return False
    return found != names and Counter(found) == Counter(names)


def _check_insert_any(problem: Problem, text: str) -> bool:
    names, found = list_of_question(problem), parse_list(text)
    if found is None:
        return False
    new = new_name(problem)
    return found.count(new) == 1 and [n for n in found if n != new] == names


def _check_replace_any(problem: Problem, text: str) -> bool:
    names, found = list_of_question(problem), parse_list(text)
    if found is None:
        return False
    new = new_name(problem)
    if len(found) != len(names) or found.count(new) != 1:
        return False
    return all(f in (n, new) for f, n in zip(found, names, strict=True))


# Sorting and adding are learnt last, hence their larger shares.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("copy", 0.05, _copy, _check_exact),
        Task("reverse", 0.09, _reverse, _check_exact),
        Task("sort", 0.18, _sort, _check_exact),
        Task("insert", 0.11, _insert, _check_exact),
        Task("remove", 0.08, _remove, _check_exact),
        Task("replace", 0.09, _replace, _check_exact),
        Task("add", 0.18, _add, _check_add),
        Task("spell", 0.08, _spell, _check_exact),
        Task("shuffle", 0.06, _shuffle, _check_shuffle),
        Task("insert_any", 0.04, _insert_any, _check_insert_any),
        Task("replace_any", 0.04, _replace_any, _check_replace_any),
    )
}
FREE_TASKS = ("shuffle", "insert_any", "replace_any")
