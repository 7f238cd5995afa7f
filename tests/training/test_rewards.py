# SPDX-License-Identifier: Apache-2.0
"""Rewards: the built-in ones, a user's file, and what errors of it say."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from vllm_dlm.tasks.problems import sample_problem
from vllm_dlm.training.reinforcement.rewards import Reward, load_reward


def rewards(name: str, text: str, record: dict) -> float:
    (found,) = load_reward(name)(["?"], [text], [record])
    return found


def test_tasks():
    rng = random.Random(0)
    problems = [sample_problem(rng) for _ in range(50)]
    records = [vars(problem) for problem in problems]
    right = [problem.answer for problem in problems]
    reward = load_reward("tasks")
    asked = ["?"] * 50
    assert reward(asked, right, records) == [1.0] * 50
    assert reward(asked, ["[Ada"] * 50, records) == [0.0] * 50
    shuffled = {"task": "shuffle", "question": "Shuffle [Ada, Ben]", "answer": "x"}
    assert rewards("tasks", "[Ben, Ada]", shuffled) == 1.0


@pytest.mark.parametrize(
    ("name", "text", "answer", "reward"),
    [
        ("exact", " yes\n", "yes", 1),
        ("exact", "yes.", "yes", 0),
        ("number", "3 apples and 1,204.50 more", "#### 1204.5", 1),
        ("number", "first 7, then 8", 7, 0),
        ("number", "none", "7", 0),
        ("number", "it is -7.", "-7", 1),
        ("boxed", r"so \boxed{1}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}", 1),
        ("boxed", r"\boxed{ x + 1 }", r"It is \boxed{x+1}", 1),
        ("boxed", "x+1", "x+1", 0),
        ("boxed", r"\boxed{x+1", "x+1", 0),
    ],
)
def test_answers(name: str, text: str, answer: object, reward: float):
    assert rewards(name, text, {"answer": answer}) == reward


FILE = """
import numpy

def length(prompts, texts, records):
    return [len(text) for text in texts]

def as_array(prompts, texts, records):
    return numpy.full(len(texts), 0.5)

def too_few(prompts, texts, records):
    return [1.0]

def one(prompts, texts, records):
    return 1.0

def words(prompts, texts, records):
    return ["good" for text in texts]

def infinite(prompts, texts, records):
    return [0.0] + [float("inf") for text in texts[1:]]

def divides(prompts, texts, records):
    return [1 / record["n"] for record in records]

def together(prompts, texts, records):
    return [1 / (2 - len(texts))] * len(texts)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(FILE, encoding="utf-8")
    return file


def asked(file: Path, name: str) -> list[float]:
    reward = load_reward(f"{file}:{name}")
    records = [{"n": 1, "id": "first"}, {"n": 0, "id": "second"}]
    return reward(["p", "p"], ["a", "bcd"], records)


def test_a_users_function(file: Path):
    assert asked(file, "length") == [1.0, 3.0]
    assert asked(file, "as_array") == [0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("too_few", "returned 1 values for 2 texts"),
        ("one", "returned 1.0, not a list"),
        ("words", "returned 'good' for text 0"),
        ("infinite", "returned inf for text 1 ('bcd', of the record"),
        ("divides", "'second'}: ZeroDivisionError"),
        ("together", "2 texts together, but on none of them alone: ZeroDivision"),
    ],
)
def test_errors_of_a_users_function(file: Path, name: str, words: str):
    with pytest.raises(ValueError, match="reward .*mine.py") as error:
        asked(file, name)
    assert words in str(error.value)


def test_a_function_that_is_not_there(file: Path):
    with pytest.raises(ValueError, match="no function 'lenght'; it has length, as_"):
        load_reward(f"{file}:lenght")
    with pytest.raises(ValueError, match="exakt.*exact.*FILE.py:NAME"):
        load_reward("exakt")
    with pytest.raises(ValueError, match=r"no file .*none.py"):
        load_reward(f"{file.parent}/none.py:reward")
    file.write_text("import nothing_like_that", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be imported: ModuleNotFoundError"):
        load_reward(f"{file}:reward")


def test_a_record_without_an_answer():
    with pytest.raises(ValueError, match='no "answer"'):
        rewards("exact", "x", {"prompt": "y"})
    with pytest.raises(ValueError, match="needs records with .task."):
        rewards("tasks", "x", {"task": "none", "answer": "y"})
    with pytest.raises(ValueError, match="has no number"):
        rewards("number", "x", {"answer": "y"})


def test_a_boolean_is_a_number():
    reward = Reward("own", lambda prompts, texts, records: [True, False])
    assert reward(["", ""], ["", ""], [{}, {}]) == [1.0, 0.0]
