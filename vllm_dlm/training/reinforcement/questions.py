# SPDX-License-Identifier: Apache-2.0
"""The data of reinforcement learning: questions, and records that rewards read."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dlm.files.whole_files import BadFile, parse_json, parse_lines
from vllm_dlm.messages import quote, unknown
from vllm_dlm.tasks import tokenizer as tasks_tokenizer
from vllm_dlm.tasks.problems import TASKS, sample_problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WHAT = "file of questions"

FORMS = (
    '{"prompt": text}',
    '{"prompt_ids": [...]}',
    '{"messages": [{"role": ..., "content": ...}, ...]}, the last one a user\'s',
)
"""What a line may be; all further keys ("answer", ...) are the reward's."""


@dataclass(frozen=True)
class Question:
    """A prompt to be answered.

    Args:
        prompt_ids: Token ids.
        prompt: The same as the reward sees it: a text.
        record: The line of the data.
    """

    prompt_ids: list[int]
    prompt: str
    record: Mapping[str, Any]


def read_questions(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt_length: int | None = None,
) -> list[Question]:
    """Read a .jsonl file of questions, in any of the three `FORMS`.

    Args:
        path: The file.
        tokenizer: The model's. A text is tokenized as a server does with a
            completion's prompt, messages by the chat template.
        prompt_length: Most tokens of a prompt; longer ones lose their first tokens.

    Raises:
        ValueError: a line has none of the forms; the error names the line.
    """

    def parse(line: str) -> Question:
        ids, prompt, record = _parse(line, tokenizer)
        cut = ids if prompt_length is None else ids[-prompt_length:]
        return Question(cut, prompt, record)

    questions = parse_lines(path, _WHAT, parse)
    if not questions:
        raise BadFile(_WHAT, path, "it has no questions")
    return questions


def task_questions(
    count: int, seed: int, tasks: Sequence[str] | None = None, split: str = "train"
) -> list[Question]:
    """Problems of the built-in tasks in llada-tiny's tokens, every other one as a chat.

    Their records are what the reward `tasks` reads.

    Args:
        count: How many.
        seed: The same seed gives the same problems.
        tasks: Names of the tasks, all of them by default.
        split: "train" or "heldout"; no question is in both.

    Raises:
        ValueError: there is no task of a name.
    """
    for name in tasks or ():
        if name not in TASKS:
            raise ValueError(f"--tasks: {unknown(name, TASKS)}")
    rng = random.Random(f"questions-{split}-{seed}")
    problems = [sample_problem(rng, split, tasks) for _ in range(count)]
    return [
        Question(
            tasks_tokenizer.encode_prompt(problem.question, chat=index % 2 == 0),
            problem.question,
            vars(problem),
        )
        for index, problem in enumerate(problems)
    ]


def _parse(
    line: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], str, dict[str, Any]]:
    record = parse_json(line)
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, not {quote(record)}")
    forms = [key for key in ("prompt", "prompt_ids", "messages") if key in record]
    if len(forms) != 1:
        raise ValueError(f"expected the keys of one of {'; '.join(FORMS)}")
    value = record[forms[0]]
    if forms == ["prompt"]:
        if not isinstance(value, str) or not value:
            raise ValueError(f'"prompt" must be a text, not {quote(value)}')
        return list(tokenizer.encode(value)), value, record
    if forms == ["prompt_ids"]:
        is_list = isinstance(value, list) and value
        if not is_list or not all(
            type(i) is int and 0 <= i < len(tokenizer) for i in value
        ):
            raise ValueError(
                f'"prompt_ids" must be token ids from 0 to {len(tokenizer) - 1}'
            )
        return value, str(tokenizer.decode(value)), record
    try:
        text = tokenizer.apply_chat_template(
            value, tokenize=False, add_generation_prompt=True
        )
        asked = str(value[-1]["content"])
        role = value[-1]["role"]
    except Exception as error:  # templates raise whatever Jinja and they like
        raise ValueError(f"the model's chat template refuses it ({error})") from None
    if role != "user":
        raise ValueError(f"the last message must be a user's, not of {quote(role)}")
    ids = list(tokenizer.encode(str(text), add_special_tokens=False))
    return ids, asked, record
