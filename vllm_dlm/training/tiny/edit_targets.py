# SPDX-License-Identifier: Apache-2.0
"""The right answer that is nearest to what is written, for tasks with several.

Ours, for the built-in tasks: a program knows all their right answers. Where a writer
of many tokens at once has written `[Ben, Ben, Carl]`, to put right as few names as
possible is a function of what is written, which a network can learn; any one right
answer is not. Where masks are left and nothing is wrong yet, an answer is drawn, so
that the masks keep their several answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from vllm_dlm.tasks.problems import FREE_TASKS, Problem, list_of_question, new_name


def nearest_names(
    problem: Problem, written: Sequence[str | None], rng: random.Random
) -> list[str]:
    """The names of the right answer that changes the fewest written ones.

    Of several, `shuffle` keeps the first of a name that is there twice and puts the
    missing ones in the question's order; the other tasks take the leftmost place. A
    shuffled list in the question's order gets its last two changed names swapped.

    Args:
        problem: A problem of `FREE_TASKS`.
        written: What stands at each name's place: any word, or None for a mask. As many
            as a right answer has names.
        rng: What a right beginning goes on with is drawn from it.

    Raises:
        ValueError: the problem is of another task.
    """
    names = list_of_question(problem)
    if problem.task == "shuffle":
        return _shuffled(names, written, rng)
    if problem.task not in FREE_TASKS:
        raise ValueError(f"{problem.task} has one right answer, not several")
    new = new_name(problem)
    replaces = problem.task == "replace_any"
    answers = [
        [*names[:place], new, *names[place + replaces :]]
        for place in range(len(names) + (not replaces))
    ]
    changes = [_changes(written, answer) for answer in answers]
    fewest = min(changes)
    found = [a for a, count in zip(answers, changes, strict=True) if count == fewest]
    return rng.choice(found) if fewest == 0 and None in written else found[0]


def _changes(written: Sequence[str | None], answer: Sequence[str]) -> int:
    """How many written names are others in the answer."""
    pairs = zip(written, answer, strict=True)
    return sum(name is not None and name != right for name, right in pairs)


def _shuffled(
    names: list[str], written: Sequence[str | None], rng: random.Random
) -> list[str]:
    kept: list[str | None] = []
    for name in written:
        kept.append(name if name in names and name not in kept else None)
    missing = [name for name in names if name not in kept]
    if None in written and kept == list(written):
        rng.shuffle(missing)
    rest = iter(missing)
    answer = [next(rest) if name is None else name for name in kept]
    if answer == names:
        changed = [place for place, name in enumerate(kept) if name is None]
        last = changed[-2:] if len(changed) > 1 else [-2, -1]
        answer[last[0]], answer[last[1]] = answer[last[1]], answer[last[0]]
    return answer
