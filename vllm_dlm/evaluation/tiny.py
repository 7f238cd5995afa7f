# SPDX-License-Identifier: Apache-2.0
"""The problems of the built-in models, as a task: all kinds together, or one of them.

Several have more than one right answer, as tasks of ParallelBench have: see
docs/parallelbench.md for what these show.
"""

from __future__ import annotations

from vllm_dlm.evaluation.tasks import Family, Question, Task, TaskOptions
from vllm_dlm.tasks.problems import TASKS, sample_problems

PROBLEMS = 100
"""Questions of a task, unless asked otherwise."""
MAX_TOKENS = 32


def make(name: str, options: TaskOptions) -> Task:
    """Held-out problems that no built-in model was trained on."""
    _, slash, kind = name.partition("/")
    kinds = [kind] if slash else None
    count = options.limit or PROBLEMS
    problems = sample_problems(count, options.seed, "heldout", kinds)
    return Task(
        name,
        [Question((problem.question,)) for problem in problems],
        lambda texts: [
            float(problem.check(text))
            for problem, text in zip(problems, texts, strict=True)
        ],
        MAX_TOKENS,
    )


FAMILY = Family(make, tuple(TASKS))
