# SPDX-License-Identifier: Apache-2.0
"""MBPP (arXiv 2108.07732) and HumanEval (arXiv 2107.03374): programs and their tests.

From files in their published form, JSON lines. An answer's program is what stands in
its first fenced block, or all of it, and it is right if its tests pass in the sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import BaseModel

from vllm_dlm.evaluation.tasks import Family, Question, Task, TaskOptions
from vllm_dlm.files.whole_files import checked, parse_json, parse_lines

MAX_TOKENS = 512
FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)

MBPP_EXAMPLES = range(1, 11)
"""Task ids that are published as examples."""
MBPP_TEST = range(11, 511)
"""Task ids of the published test split."""
MBPP_SHOTS = 3
"""Examples in front of each question, as published."""

# What a base model goes on with when its function is done.
NEXT_PART = ("\ndef ", "\nclass ", "\nif __name__", "\nprint(", "\n#", "\n```")


class MbppRecord(BaseModel):
    """A line of MBPP's file."""

    task_id: int
    text: str
    code: str
    test_list: list[str]
    test_setup_code: str = ""

    def asked(self) -> str:
        """The question; the tests tell the function's name."""
        tests = "\n".join(self.test_list)
        return f"{self.text} The function has to pass these tests:\n{tests}\n"

    def solved(self) -> str:
        """An answer, for an example."""
        code = self.code.replace("\r\n", "\n").strip()
        return f"```python\n{code}\n```"


class HumanEvalRecord(BaseModel):
    """A line of HumanEval's file."""

    prompt: str
    test: str
    entry_point: str


def program_in(text: str) -> str:
    """The program in an answer."""
    found = FENCED.search(text)
    return found.group(1) if found else text


def make_mbpp(name: str, options: TaskOptions) -> Task:
    """Short functions, described in a sentence."""
    sandbox = options.sandbox_of(name)
    path = options.file_of(name, "the published mbpp.jsonl")
    records = parse_lines(
        path, name, lambda line: checked(MbppRecord, parse_json(line))
    )
    shots = MBPP_SHOTS if options.shots is None else options.shots
    known = [one for one in records if one.task_id in MBPP_EXAMPLES][:shots]
    if len(known) < shots:
        raise ValueError(
            f"--shots {shots}: {path} has {len(known)} examples, the tasks 1 to 10"
        )
    examples = [turn for one in known for turn in (one.asked(), one.solved())]
    asked = [one for one in records if one.task_id in MBPP_TEST][: options.limit]

    def score(texts: Sequence[str]) -> list[float]:
        programs = [
            "\n".join([one.test_setup_code, program_in(text), *one.test_list])
            for one, text in zip(asked, texts, strict=True)
        ]
        return [float(passed) for passed in sandbox.pass_all(programs)]

    return Task(
        name,
        [Question((*examples, one.asked())) for one in asked],
        score,
        MAX_TOKENS,
        stop=("\n```\n",),
    )


def make_humaneval(name: str, options: TaskOptions) -> Task:
    """Functions to be completed."""
    sandbox = options.sandbox_of(name)
    path = options.file_of(name, "the published HumanEval.jsonl, unpacked")
    asked = parse_lines(
        path,
        name,
        lambda line: checked(HumanEvalRecord, parse_json(line)),
        options.limit,
    )

    def score(texts: Sequence[str]) -> list[float]:
        programs = [
            "\n".join([completed(one, text), one.test, f"check({one.entry_point})"])
            for one, text in zip(asked, texts, strict=True)
        ]
        return [float(passed) for passed in sandbox.pass_all(programs)]

    return Task(
        name,
        [Question((one.prompt,)) for one in asked],
        score,
        MAX_TOKENS,
        stop=NEXT_PART,
    )


def completed(record: HumanEvalRecord, text: str) -> str:
    """A whole program: the answer's own, or the question's with the answer behind."""
    program = program_in(text)
    if re.search(rf"^def {re.escape(record.entry_point)}\b", program, re.MULTILINE):
        # Its imports stand in the question.
        head = record.prompt.partition("def ")[0]
        return head + program
    return record.prompt + program


MBPP = Family(make_mbpp, takes_data=True, takes_shots=True)
HUMANEVAL = Family(make_humaneval, takes_data=True)
