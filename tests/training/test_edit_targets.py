# SPDX-License-Identifier: Apache-2.0
"""The nearest right answer of tasks with several, by hand and against all of them."""

import random
from itertools import permutations

import pytest

from vllm_dlm.tasks.problems import (
    FREE_TASKS,
    Problem,
    format_list,
    list_of_question,
    new_name,
    parse_list,
    sample_problems,
)
from vllm_dlm.training.tiny.edit_targets import nearest_names

SHUFFLE = Problem("shuffle", "Shuffle [Ada, Ben, Carl, Dora]", "")
INSERT = Problem("insert_any", "Insert Gus anywhere in [Ada, Ben]", "")
REPLACE = Problem("replace_any", "Replace any name with Gus in [Ada, Ben, Carl]", "")


@pytest.mark.parametrize(
    ("problem", "written", "right"),
    [
        (SHUFFLE, "Ben Ben Ben Carl", "Ben Ada Dora Carl"),
        (SHUFFLE, "Dora Carl Ben Ada", "Dora Carl Ben Ada"),
        (SHUFFLE, "Ben x Ada Dora", "Ben Carl Ada Dora"),
        # What would give the question's own order: two names change places.
        (SHUFFLE, "Ada Ben Carl Dora", "Ada Ben Dora Carl"),
        (SHUFFLE, "Ada Ada Carl Dora", "Ada Ben Dora Carl"),
        (SHUFFLE, "Ada Ada Ada Dora", "Ada Carl Ben Dora"),
        (INSERT, "Ada Ada Ben", "Gus Ada Ben"),
        (INSERT, "Gus Gus Gus", "Gus Ada Ben"),
        (INSERT, "Gus Gus Ben", "Gus Ada Ben"),
        (INSERT, "Ada Ben Gus", "Ada Ben Gus"),
        (REPLACE, "Ada Ben Carl", "Gus Ben Carl"),
        (REPLACE, "Ada Gus Gus", "Ada Gus Carl"),
        (REPLACE, "Ada Ben Gus", "Ada Ben Gus"),
    ],
)
def test_the_nearest_answer_by_hand(problem: Problem, written: str, right: str):
    found = nearest_names(problem, written.split(), random.Random(0))
    assert found == right.split()


def right_answers(problem: Problem) -> list[list[str]]:
    names = list_of_question(problem)
    if problem.task == "shuffle":
        return [list(each) for each in permutations(names) if list(each) != names]
    new, skipped = new_name(problem), int(problem.task == "replace_any")
    return [
        answer
        for place in range(len(names) + 1)
        for answer in [[*names[:place], new, *names[place + skipped :]]]
        if problem.check(format_list(answer))
    ]


@pytest.mark.parametrize("task", FREE_TASKS)
@pytest.mark.parametrize("masks", [False, True])
def test_no_right_answer_is_nearer(task: str, masks: bool):
    rng = random.Random(f"{task}-{masks}")
    seen = 0
    for problem in sample_problems(60, 0, "train", [task]):
        length = len(parse_list(problem.answer) or ())
        words = [*list_of_question(problem), "Zoe", *([None] * 2 if masks else [])]
        if task != "shuffle":
            words.append(new_name(problem))
        written = rng.choices(words, k=length)

        def changes(answer: list[str], written=written) -> int:
            pairs = zip(written, answer, strict=True)
            return sum(name not in (None, right) for name, right in pairs)

        found = nearest_names(problem, written, rng)
        assert problem.check(format_list(found))
        fewest = min(map(changes, right_answers(problem)))
        # Two names more where they change places to leave the question's order.
        slack = 2 if task == "shuffle" else 0
        assert fewest <= changes(found) <= fewest + slack
        seen += changes(found) == fewest
    assert seen >= 50


@pytest.mark.parametrize("problem", [SHUFFLE, INSERT, REPLACE])
def test_a_right_beginning_goes_on_with_any_answer(problem: Problem):
    length = len(right_answers(problem)[0])
    blank = [None] * length
    found = {
        tuple(nearest_names(problem, blank, random.Random(seed))) for seed in range(300)
    }
    assert found == set(map(tuple, right_answers(problem)))


def test_a_task_with_one_answer_is_refused():
    with pytest.raises(ValueError, match="copy has one right answer"):
        nearest_names(Problem("copy", "Copy [Ada]", "[Ada]"), ["Ada"], random.Random(0))
