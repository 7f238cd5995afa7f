# SPDX-License-Identifier: Apache-2.0
"""Tasks: what is asked, who is right, and what is refused. No engine."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest

from vllm_dlm.evaluation.code_tasks import HumanEvalRecord, completed, program_in
from vllm_dlm.evaluation.gsm8k import number_of
from vllm_dlm.evaluation.sandbox import Sandbox
from vllm_dlm.evaluation.tasks import (
    Question,
    Task,
    TaskOptions,
    expanded,
    make_tasks,
)

SANDBOX = Sandbox(seconds=20, confine=False)


def written(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def only(name: str, **options: object) -> Task:
    (task,) = make_tasks([name], TaskOptions(**options))  # type: ignore[arg-type]
    return task


# -- names and options -----------------------------------------------------


def test_a_family_stands_for_all_that_can_be_asked():
    names = expanded(["tiny", "parallelbench", "parallelbench/copy"])
    assert names[:2] == ["tiny", "parallelbench/copy"]
    # Ten lists and two puzzles; the five that need other programs to judge have a name.
    assert len(names) == 1 + 12
    assert len(set(names)) == len(names)
    texts = expanded(["parallelbench/texts"])
    assert len(texts) == 5 and not set(texts) & set(names)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["tinny"], {}, "'tinny' is no task: choose of tiny, "),
        (["tiny/fly"], {}, "tiny has no 'fly'; it has copy"),
        (["gsm8k"], {}, "--data gsm8k=FILE"),
        (["mbpp"], {}, "--allow-code"),
        (["humaneval"], {}, "--allow-code"),
        (["humaneval"], {"sandbox": SANDBOX}, "HumanEval.jsonl"),
        (["tiny"], {"shots": 2}, "--shots: not for tiny, but for gsm8k, mbpp"),
        (["tiny"], {"data": {"tiny": Path("x")}}, "--data: not for tiny"),
        (["tiny"], {"data": {"gsm8k": Path("x")}}, "--tasks does not name gsm8k"),
    ],
)
def test_refusals(names, options, message):
    with pytest.raises(ValueError, match=message):
        make_tasks(names, TaskOptions(**options))


def test_a_question_as_text_and_as_chat():
    question = Question(("1+1=", "2", "2+2="))
    assert question.text() == "1+1=2\n\n2+2="
    assert [one["role"] for one in question.messages()] == [
        *("user", "assistant", "user")
    ]


def test_seeds_and_limits():
    one, other = only("tiny", limit=5), only("tiny", limit=5, seed=1)
    assert len(one.questions) == 5
    assert one.questions == only("tiny", limit=5).questions != other.questions


# -- GSM8K -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 and 4.\n#### 1,234", "1234"),
        ("#### 7 apples, not 8", "7"),
        ("It is 12, then 15.5.", "15.5"),
        ("The answer is -3", "-3"),
        ("none", None),
        ("####", None),
        ("5 is it ####", "5"),
    ],
)
def test_numbers(text: str, number: str | None):
    assert number_of(text) == (None if number is None else Decimal(number))


def test_gsm8k_from_a_file(tmp_path: Path):
    lines = [{"question": f"{n} and 1?", "answer": f"So\n#### {n + 1}"} for n in (1, 5)]
    path = written(tmp_path / "test.jsonl", *lines)
    task = only("gsm8k", data={"gsm8k": path}, shots=1, limit=3)
    (question,) = task.questions
    assert question.text().count("Question:") == 2 and "#### 2" in question.text()
    assert task.score(["#### 6.0"]) == [1.0]
    assert task.score(["#### 2"]) == [0.0]
    bad = written(tmp_path / "bad.jsonl", {"question": "?", "answer": "none"})
    with pytest.raises(ValueError, match="line 1: the answer has no number"):
        only("gsm8k", data={"gsm8k": bad})
    with pytest.raises(ValueError, match="line 2: .*answer"):
        only("gsm8k", data={"gsm8k": written(path, lines[0], {"question": "x"})})


# -- programs --------------------------------------------------------------


def test_mbpp_from_a_file(tmp_path: Path):
    def record(number: int) -> dict[str, object]:
        return {
            "task_id": number,
            "text": "Write a function to add one.",
            "code": "def f(x):\r\n  return x + 1",
            "test_list": ["assert f(1) == 2", "assert f(2) == 3"],
            "test_setup_code": "",
            "challenge_test_list": [],
        }

    path = written(tmp_path / "mbpp.jsonl", *map(record, (2, 3, 4, 11, 12, 600)))
    task = only("mbpp", data={"mbpp": path}, sandbox=SANDBOX)
    assert len(task.questions) == 2
    assert [len(question.turns) for question in task.questions] == [7, 7]
    right = "```python\ndef f(x):\n    return 1 + x\n```\nThat is it."
    assert task.score([right, "def f(x):\n    return 2"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="--shots 4: .* has 3 examples"):
        only("mbpp", data={"mbpp": path}, sandbox=SANDBOX, shots=4)


def test_humaneval_from_a_file(tmp_path: Path):
    record = {
        "task_id": "HumanEval/0",
        "prompt": 'from math import floor\n\ndef f(x):\n    """Round down."""\n',
        "test": "def check(candidate):\n    assert candidate(1.5) == 1\n",
        "entry_point": "f",
        "canonical_solution": "    return floor(x)\n",
    }
    path = written(tmp_path / "HumanEval.jsonl", record)
    task = only("humaneval", data={"humaneval": path}, sandbox=SANDBOX)
    assert task.score(["    return floor(x)\n"]) == [1.0]
    assert task.score(["    return x\n"]) == [0.0]
    whole = "Here:\n```python\ndef f(x):\n    return floor(x)\n```"
    assert task.score([whole]) == [1.0]
    assert completed(HumanEvalRecord(**record), whole).count("def f") == 1


def test_the_program_of_an_answer():
    assert program_in("a\n```py\nx = 1\n```\n```\ny\n```") == "x = 1\n"
    assert program_in("```python\nx = 1") == "x = 1"
    assert program_in("x = 1") == "x = 1"
