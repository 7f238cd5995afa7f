# SPDX-License-Identifier: Apache-2.0
"""How many held-out problems a decoder answers right: any function, or an engine."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.problems import TASKS, Problem, sample_problems

if TYPE_CHECKING:
    from vllm import LLM


def exact_match(
    decode: Callable[[list[list[int]]], list[list[int]]],
    num_problems: int,
    *,
    seed: int = 0,
    batch_size: int = 64,
    tasks: list[str] | None = None,
) -> dict[str, float]:
    """Exact match per task on held-out problems, and over all as "all".

    Every other problem is asked through the chat template, the rest as plain text.

    Args:
        decode: Token ids of the answers of a list of prompts.
        num_problems: Number of problems.
        seed: Seed of the problems.
        batch_size: Problems that `decode` gets at a time.
        tasks: Names of the tasks, all of them by default.
    """
    problems = sample_problems(num_problems, seed, "heldout", tasks)
    right: dict[str, list[bool]] = defaultdict(list)
    for first in range(0, len(problems), batch_size):
        batch = problems[first : first + batch_size]
        prompts = [
            tokenizer.encode_prompt(problem.question, chat=index % 2 == 0)
            for index, problem in enumerate(batch)
        ]
        for problem, answer in zip(batch, decode(prompts), strict=True):
            is_right = problem.check(tokenizer.decode(answer))
            right[problem.task].append(is_right)
            right["all"].append(is_right)
    order = [*TASKS, "all"]
    return {task: sum(right[task]) / len(right[task]) for task in order if right[task]}


@dataclass(frozen=True)
class Served:
    """What an engine made of a list of problems."""

    problems: int
    right: int
    forwards: int
    """Forwards of all requests; one that several share counts for each of them."""
    tokens: int
    """Tokens of all answers, the one that ends the text included."""
    seconds: float

    @property
    def accuracy(self) -> float:
        return self.right / self.problems

    @property
    def forwards_per_request(self) -> float:
        return self.forwards / self.problems

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.forwards

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def evaluate_served(
    llm: LLM,
    problems: Sequence[Problem],
    options: Mapping[str, Any],
    *,
    max_tokens: int,
    progress: bool = True,
) -> Served:
    """Answer problems greedily, all in one call, and count.

    Args:
        llm: an engine of llada-tiny.
        options: the requests' own, as `extra_args={"dlm": options}`.
        max_tokens: most tokens of an answer, which is the width of its canvas.
        progress: show vLLM's progress bar.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, extra_args={"dlm": dict(options)}
    )
    started = time.monotonic()
    questions = [problem.question for problem in problems]
    results = llm.generate(questions, sampling, use_tqdm=progress)
    seconds = time.monotonic() - started
    outputs = [result.outputs[0] for result in results]
    return Served(
        problems=len(problems),
        right=sum(
            problem.check(output.text)
            for problem, output in zip(problems, outputs, strict=True)
        ),
        forwards=sum(sum(output.spec_decode_metrics.histogram) for output in outputs),
        tokens=sum(len(output.token_ids) for output in outputs),
        seconds=seconds,
    )
