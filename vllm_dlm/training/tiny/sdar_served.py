# SPDX-License-Identifier: Apache-2.0
"""How an engine answers with sdar-tiny: single questions, and chats of many turns."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.problems import TASKS, sample_problem, sample_problems

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput


@dataclass(frozen=True)
class Answered:
    """What an engine made of questions."""

    right: dict[str, float]
    """Exact match of each task."""
    forwards: float
    """Forwards per answer."""


@dataclass(frozen=True)
class Turn:
    """What an engine made of the questions of one turn of all chats."""

    right: float
    prompt_tokens: float
    """Tokens of a chat up to the question's end."""
    cached: float
    """Share of these whose KV was found by prefix caching."""


def answer_questions(
    llm: LLM, options: Mapping[str, Any], per_task: int, seed: int, max_tokens: int
) -> Answered:
    """Ask held-out problems, every other one through the chat template.

    Args:
        llm: An engine.
        options: The requests' own.
        per_task: Problems of each task.
        seed: Of the problems.
        max_tokens: Most tokens of an answer.
    """
    problems = [
        problem
        for task in TASKS
        for problem in sample_problems(per_task, seed, "heldout", [task])
    ]
    prompts = [
        tokenizer.encode_prompt(problem.question, chat=index % 2 == 0)
        for index, problem in enumerate(problems)
    ]
    results = _generate(llm, prompts, options, max_tokens)
    right: dict[str, list[bool]] = defaultdict(list)
    for problem, result in zip(problems, results, strict=True):
        right[problem.task].append(problem.check(result.outputs[0].text))
    return Answered(
        {task: fmean(found) for task, found in right.items()},
        fmean(
            sum(result.outputs[0].spec_decode_metrics.histogram) for result in results
        ),
    )


def answer_chats(
    llm: LLM,
    options: Mapping[str, Any],
    chats: int,
    turns: int,
    seed: int,
    max_tokens: int,
) -> list[Turn]:
    """Ask a held-out problem in each turn of some chats, behind the engine's answers.

    Args:
        llm: An engine, with prefix caching.
        options: The requests' own.
        chats: How many; they go on side by side.
        turns: Questions of each.
        seed: Of the problems.
        max_tokens: Most tokens of an answer.
    """
    rng = random.Random(f"chats-{seed}")
    texts: list[list[int]] = [[] for _ in range(chats)]
    found = []
    for turn in range(turns):
        problems = [sample_problem(rng, "heldout") for _ in range(chats)]
        for text, problem in zip(texts, problems, strict=True):
            prompt = tokenizer.encode_prompt(problem.question, chat=True)
            # Only the first message begins with <|startoftext|>.
            text += prompt[turn > 0 :]
        results = _generate(llm, texts, options, max_tokens)
        tokens = [len(text) for text in texts]
        cached = [result.num_cached_tokens or 0 for result in results]
        right = []
        for text, problem, result in zip(texts, problems, results, strict=True):
            answer = result.outputs[0].text
            right.append(problem.check(answer))
            # As the chat template does.
            text += [
                *tokenizer.encode(answer.strip()),
                tokenizer.TOKEN_IDS[tokenizer.EOT],
            ]
        found.append(Turn(fmean(right), fmean(tokens), sum(cached) / sum(tokens)))
    return found


def _generate(
    llm: LLM,
    prompts: Sequence[list[int]],
    options: Mapping[str, Any],
    max_tokens: int,
) -> list[RequestOutput]:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, extra_args={"dlm": dict(options)}
    )
    return llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts],
        sampling,
        use_tqdm=False,
    )
