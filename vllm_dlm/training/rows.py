# SPDX-License-Identifier: Apache-2.0
"""Training data: prompts with responses, read from a file, and laid out in rows.

A row is a prompt and, right behind it, the canvas: the response and, to the canvas's
end, the end token, which the model learns and attends to like any other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from vllm_dlm.files.whole_files import BadFile, checked, parse_json, parse_lines
from vllm_dlm.tasks import tokenizer as tasks_tokenizer
from vllm_dlm.tasks.problems import sample_problem

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

FORMS = (
    '{"prompt": text, "response": text}',
    '{"prompt_ids": [...], "response_ids": [...]}',
    '{"messages": [{"role": ..., "content": ...}, ...]}, the last one the assistant\'s',
)
"""What a line of a .jsonl file of rows may be."""

Example = TypeVar("Example")


@dataclass(frozen=True)
class Row:
    """A prompt and its response, as token ids; the response with its end token."""

    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Batch:
    """Rows side by side, of one length L; all on the CPU.

    Args:
        ids: Clean token ids [R, L].
        prompt_lengths: Tokens of each prompt [R].
        valid: Bool [R, L], False behind a row's canvas: nobody may attend there.
        response: Bool [R, L], True on the canvas: the response and its padding.
    """

    ids: torch.Tensor
    prompt_lengths: torch.Tensor
    valid: torch.Tensor
    response: torch.Tensor


def read_rows(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, end_id: int | None = None
) -> list[Row]:
    """Read a .jsonl file of rows, in any of the three `FORMS`.

    A prompt that is a text is tokenized as a server does with a completion's, messages
    by the chat template. Token ids are taken as they are; texts get an end token.

    Args:
        path: The file.
        tokenizer: The model's.
        end_id: The end token; by default the tokenizer's.

    Raises:
        ValueError: a line has none of the forms, an empty prompt or response, or ids
            outside the vocabulary; the error names the line.
    """
    end = tokenizer.eos_token_id if end_id is None else end_id
    rows = parse_lines(path, _WHAT, lambda line: _parse(line, tokenizer, int(end)))
    if not rows:
        raise BadFile(_WHAT, path, "it has no rows")
    return rows


def task_rows(
    count: int, seed: int, tasks: Sequence[str] | None = None, split: str = "train"
) -> list[Row]:
    """Rows of the built-in tasks, in llada-tiny's tokens, every other one as a chat.

    Args:
        count: How many.
        seed: The same seed gives the same rows.
        tasks: Names of the tasks, all of them by default.
        split: "train" or "heldout"; no question is in both.
    """
    rng = random.Random(f"rows-{split}-{seed}")
    rows = []
    for index in range(count):
        problem = sample_problem(rng, split, tasks)
        prompt = tasks_tokenizer.encode_prompt(problem.question, index % 2 == 0)
        answer = tasks_tokenizer.encode(problem.answer)
        rows.append(Row(prompt, [*answer, tasks_tokenizer.EOS_ID]))
    return rows


def lay_out(
    rows: Sequence[Row],
    *,
    end_id: int,
    canvas_length: int | None = None,
    length: int | None = None,
) -> Batch:
    """Lay rows out side by side, left-aligned.

    With neither length a row's canvas is its response. A row's canvas never depends on
    the rows beside it.

    Args:
        rows: The rows.
        end_id: Token that fills a canvas.
        canvas_length: Tokens G of every canvas.
        length: Tokens of every row, prompt and canvas together.

    Raises:
        ValueError: both lengths are given, there are no rows, or a row is too long.
    """
    import torch

    if canvas_length is not None and length is not None:
        raise ValueError("either every canvas has one length or every row, not both")
    if not rows:
        raise ValueError("there are no rows to lay out")
    ends = []
    for row in rows:
        end = row.length
        if canvas_length is not None:
            end = len(row.prompt_ids) + canvas_length
        elif length is not None:
            end = length
        if row.length > end:
            raise ValueError(
                f"a row has {row.length} tokens, {len(row.response_ids)} of them the "
                f"response, and room for {end}"
            )
        ends.append(end)
    ids = torch.full((len(rows), max(ends)), end_id)
    for index, row in enumerate(rows):
        ids[index, : row.length] = torch.tensor(row.prompt_ids + row.response_ids)
    prompt_lengths = torch.tensor([len(row.prompt_ids) for row in rows])
    places = torch.arange(max(ends))
    valid = places < torch.tensor(ends)[:, None]
    return Batch(
        ids, prompt_lengths, valid, valid & (places >= prompt_lengths[:, None])
    )


def fitting_rows(
    rows: Sequence[Row],
    *,
    canvas_length: int | None = None,
    length: int | None = None,
) -> list[Row]:
    """The rows that `lay_out` has room for."""
    return [
        row
        for row in rows
        if (canvas_length is None or len(row.response_ids) <= canvas_length)
        and (length is None or row.length <= length)
    ]


def rows_of_step(
    rows: Sequence[Example], batch_size: int, seed: int, step: int
) -> list[Example]:
    """The rows that a step learns from: a function of seed and step alone.

    All rows come once, in a drawn order, before one comes again.
    """
    found = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, index = divmod(place, len(rows))
        found.append(rows[_order(len(rows), seed, epoch)[index]])
    return found


def step_seed(seed: int, step: int) -> int:
    """A seed for a step's noise: a function of the run's seed and the step alone."""
    digest = hashlib.blake2b(f"{seed}-{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def step_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator for a step's noise, as `step_seed`."""
    import torch

    return torch.Generator().manual_seed(step_seed(seed, step))


def take_rows(example: Example, rows: slice) -> Example:
    """Some rows of a dataclass of tensors whose first dimension is the rows."""
    return _map_tensors(example, lambda tensor: tensor[rows])


def to_device(example: Example, device: torch.device) -> Example:
    """A dataclass of tensors, on another device."""
    return _map_tensors(example, lambda tensor: tensor.to(device))


def split_rows(example: Example, num_rows: int, parts: int) -> Iterator[Example]:
    """A dataclass of tensors in so many parts of neighbouring rows, none of them empty.

    Args:
        example: Its tensors' first dimension is the rows.
        num_rows: How many there are.
        parts: In how many parts; at most `num_rows` of them are made.
    """
    parts = min(parts, num_rows)
    for part in range(parts):
        yield take_rows(
            example, slice(part * num_rows // parts, (part + 1) * num_rows // parts)
        )


def _map_tensors(example: Example, change: Any) -> Example:
    import torch

    values = {
        field.name: getattr(example, field.name)
        for field in dataclasses.fields(example)  # type: ignore[arg-type]
    }
    changed = {
        name: change(value)
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }
    return dataclasses.replace(example, **changed)  # type: ignore[type-var]


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"order-{seed}-{epoch}").shuffle(order)
    return order


_WHAT = "file of rows"


class _Texts(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    prompt: str = Field(min_length=1)
    response: str = Field(min_length=1)


class _Ids(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    prompt_ids: list[int] = Field(min_length=1)
    response_ids: list[int] = Field(min_length=1)


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    role: str
    content: str


class _Messages(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    messages: list[_Message] = Field(min_length=2)


def _parse(line: str, tokenizer: PreTrainedTokenizerBase, end_id: int) -> Row:
    value = parse_json(line)
    keys = value.keys() if isinstance(value, dict) else set()
    if "messages" in keys:
        messages = [each.model_dump() for each in checked(_Messages, value).messages]
        if messages[-1]["role"] != "assistant":
            raise ValueError("the last message must be the assistant's")
        return Row(
            _template(tokenizer, messages[:-1]),
            [*_encode(tokenizer, messages[-1]["content"]), end_id],
        )
    if "prompt_ids" in keys:
        ids = checked(_Ids, value)
        row = Row(ids.prompt_ids, ids.response_ids)
        largest = max(*row.prompt_ids, *row.response_ids)
        if min(*row.prompt_ids, *row.response_ids) < 0 or largest >= len(tokenizer):
            raise ValueError(f"token ids must be from 0 to {len(tokenizer) - 1}")
        return row
    if "prompt" in keys:
        texts = checked(_Texts, value)
        return Row(
            list(tokenizer.encode(texts.prompt)),
            [*_encode(tokenizer, texts.response), end_id],
        )
    raise ValueError(f"expected an object with the keys of one of {'; '.join(FORMS)}")


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]
) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates raise whatever Jinja and they like
        raise ValueError(f"the model's chat template refuses it ({error})") from None
    return _encode(tokenizer, str(text))
