# SPDX-License-Identifier: Apache-2.0
"""ParallelBench's tasks: drawn as described, judged as published. No engine."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import permutations
from math import factorial
from pathlib import Path

import pytest

from vllm_dlm.evaluation.parallelbench.lists import LENGTHS, LIST_TASKS, parsed, written
from vllm_dlm.evaluation.parallelbench.puzzles import (
    draw_latin_square,
    draw_sudoku,
    draw_symbols,
    is_latin_square,
    is_sudoku,
)
from vllm_dlm.evaluation.parallelbench.tasks import FREE
from vllm_dlm.evaluation.tasks import TaskOptions, make_tasks

ANSWERS = {
    # Of a list of n, how many answers are right.
    "shuffle": lambda n: factorial(n) - 1,
    "insert_random": lambda n: n + 1,
    "remove_random": lambda n: n,
    "replace_random": lambda n: n,
}


@pytest.mark.parametrize("name", LIST_TASKS)
def test_lists(name: str):
    """The drawn answer is right, and as many are as there should be."""
    task, rng = LIST_TASKS[name], random.Random(name)
    for length in (3, 4):
        for _ in range(20):
            problem = task.draw(rng, length)
            assert len(problem.names) == length
            assert task.is_right(problem, list(problem.answer))
            text = f"Here it is [x]: {written(problem.answer)}."
            assert task.is_right(problem, parsed(text))
            question = task.question(problem)
            assert written(problem.names) in question
            assert (problem.word in question) and (
                problem.index is None or f"index {problem.index}" in question
            )
            names = [*problem.names, *([problem.word] if problem.word else [])]
            orders = [
                list(order)
                for size in range(length - 1, length + 2)
                for order in permutations(names, size)
            ]
            found = [order for order in orders if task.is_right(problem, order)]
            assert len(found) == (ANSWERS[name](length) if name in FREE else 1)


def test_what_is_wrong():
    problem = LIST_TASKS["replace_random"].draw(random.Random(0), 3)
    a, b, c = problem.names
    right = LIST_TASKS["replace_random"].is_right
    assert right(problem, [a, problem.word, c])
    assert not right(problem, [a, b, c])
    assert not right(problem, [problem.word, problem.word, c])
    assert not right(problem, [a, problem.word, b])
    assert not right(problem, [])


def test_sorting_is_by_last_names():
    problem = LIST_TASKS["sort"].draw(random.Random(0), 6)
    last = [name.split()[1] for name in problem.answer]
    assert last == sorted(last)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('["A B", "C D"]', ["A B", "C D"]),
        ("first [x], then [ A B,C D, ] and more", ["A B", "C D"]),
        ('["A B", "C D"', ["A B", "C D"]),
        ("", []),
    ],
)
def test_lists_are_read_leniently(text: str, names: list[str]):
    assert parsed(text) == names


def test_latin_squares():
    rng = random.Random(1)
    seen = set()
    for _ in range(50):
        symbols = draw_symbols(rng)
        square = draw_latin_square(rng, symbols)
        seen.add(square)
        assert is_latin_square(symbols, square)
        assert is_latin_square(symbols, "Sure:\n" + square.replace(",", ", ") + "\nso")
        rows = square.splitlines()
        assert not is_latin_square(symbols, "\n".join(rows[:3]))
        assert not is_latin_square(symbols, "\n".join([*rows[:3], rows[0]]))
    assert len(seen) > 45


def test_sudokus_have_one_solution():
    rng = random.Random(2)
    for _ in range(10):
        grid, solution = draw_sudoku(rng)
        assert grid.count("0") == 4
        assert not is_sudoku(solution, solution.replace("\n", ""))
        spaced = "\n".join(" ".join(row) for row in solution.splitlines())
        assert is_sudoku(solution, f"Answer:\n{spaced}")
        assert not is_sudoku(solution, grid)


def test_questions_of_every_length():
    (task,) = make_tasks(["parallelbench/copy"], TaskOptions(limit=40))
    lengths = [len(parsed(question.turns[2])) for question in task.questions]
    assert lengths == sorted(lengths)
    assert Counter(lengths) == dict.fromkeys(LENGTHS, 10)
    answers = [written(parsed(question.turns[2])) for question in task.questions]
    assert task.score(answers) == [1.0] * 40


def test_published_questions(tmp_path: Path):
    """In both forms: as they are, and inside a line of results."""
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "[]"},
        {"role": "user", "content": "two"},
    ]
    label = {"example": '["A", "X"]', "input": ["A", "B"], "word": "X"}
    path = tmp_path / "questions.jsonl"
    line = json.dumps({"messages": chat, "label": label})
    path.write_text(f'{line}\n{{"doc": {line}, "target": "x"}}\n')
    name = "parallelbench/replace_random"
    (task,) = make_tasks([name], TaskOptions(data={name: path}))
    assert task.questions[0].turns == ("one", "[]", "two")
    assert task.score(['["X", "B"]', '["B", "X"]']) == [1.0, 0.0]
    for other in ("copy", "sudoku", "latin_square"):
        name = f"parallelbench/{other}"
        with pytest.raises(ValueError, match=f"line 1: label: not .* {other}"):
            make_tasks([name], TaskOptions(data={name: path}))
    path.write_text(json.dumps({"messages": chat[:2], "label": "[A]"}) + "\n")
    name = "parallelbench/copy"
    with pytest.raises(ValueError, match="line 1: messages: expected user"):
        make_tasks([name], TaskOptions(data={name: path}))
    path.write_text(json.dumps({"messages": chat, "label": '["A", "B"]'}) + "\n")
    (task,) = make_tasks([name], TaskOptions(data={name: path}))
    assert task.score(["[A, B]"]) == [1.0]
