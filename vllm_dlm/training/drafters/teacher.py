# SPDX-License-Identifier: Apache-2.0
"""Prompts, and a target's own answers to them: what drafters and heads learn from.

Any causal language model of transformers with its tokenizer will do. Without a file
of prompts, the built-in tasks are asked, which needs the built-in tokenizer.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, FailFast, Field, model_validator

from vllm_dlm.files.whole_files import (
    MIB,
    BadFile,
    parse_json,
    read_json,
    read_lines,
    write_json,
)
from vllm_dlm.tasks.problems import sample_problem
from vllm_dlm.tasks.tokenizer import TOKEN_IDS, encode_prompt

if TYPE_CHECKING:
    import torch
    from transformers import (
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )


@dataclass(frozen=True)
class Answered:
    """Prompts and what a target answered, as token ids; the end token included."""

    prompts: list[list[int]]
    answers: list[list[int]]


def load_tokenizer(
    model: str, config: PretrainedConfig | None = None
) -> PreTrainedTokenizerBase:
    """Tokenizer of a folder, hub id or alias.

    Args:
        config: The model's, where transformers does not know its type.

    Raises:
        ValueError: there is none that transformers can load.
    """
    from transformers import AutoTokenizer

    from vllm_dlm.config.aliases import resolve

    try:
        return AutoTokenizer.from_pretrained(resolve(model), config=config)
    except Exception as error:  # damaged files raise the tokenizers' own, of no class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot load the tokenizer of {model}: {reason}") from error


def load_causal_lm(
    model: str, device: str = "cpu", dtype: str = "float32"
) -> PreTrainedModel:
    """An autoregressive model, frozen; a folder, hub id or alias.

    Args:
        model: Folder, hub id or alias.
        device: As PyTorch names it.
        dtype: Of its weights, as PyTorch names it.

    Raises:
        ValueError: transformers knows no causal language model there, or PyTorch has
            no such device.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_dlm.config.aliases import resolve

    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            resolve(model), dtype=getattr(torch, dtype)
        )
    except Exception as error:  # also those of damaged weights, of no common class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{model} is not an autoregressive model that transformers can load: "
            f"{reason}"
        ) from error
    loaded = loaded.requires_grad_(False).eval()
    try:
        return loaded.to(device)
    except (RuntimeError, AssertionError) as error:
        # PyTorch asserts that it was built for a device.
        raise ValueError(f"device {device!r} cannot be used: {error}") from error


def check_same_vocabulary(target: str, drafter: str) -> None:
    """Refuse a pair whose token ids mean different texts.

    Raises:
        ValueError: the vocabularies differ.
    """
    vocabularies = [load_tokenizer(name).get_vocab() for name in (target, drafter)]
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"{target} and {drafter} have different vocabularies; a drafter must have "
            "the target's tokenizer"
        )


def load_prompts(
    path: str | Path | None, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
) -> list[list[int]]:
    """Token ids of up to `count` prompts, in an order drawn from `seed`.

    Args:
        path: A text file of one prompt per line, or a .jsonl file of objects with the
            key "prompt"; None asks the built-in tasks (never a held-out problem).
        tokenizer: The target's.
        count: Most prompts.
        seed: Seed of the problems, or of the order of a file's prompts.

    Raises:
        ValueError: the file has no prompt or a line is not understood; or the
            tokenizer is not the built-in one, and there is no file.
    """
    if count < 1:
        raise ValueError(f"the number of prompts must be at least 1, not {count}")
    if path is None:
        if tokenizer.get_vocab() != TOKEN_IDS:
            raise ValueError(
                "the built-in tasks are written in the tokenizer of llama-tiny, which "
                "the target does not have; pass a file with --prompts"
            )
        rng = random.Random(f"prompts-{seed}")
        return [
            encode_prompt(sample_problem(rng).question, rng.random() < 0.5)
            for _ in range(count)
        ]
    texts = _read_texts(Path(path))
    random.Random(f"prompts-{seed}").shuffle(texts)
    return [tokenizer.encode(text) for text in texts[:count]]


def _read_texts(path: Path) -> list[str]:
    texts = []
    for number, line in enumerate(read_lines(path, "prompts"), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            texts.append(line.rstrip("\n"))
            continue
        try:
            texts.append(str(parse_json(line)["prompt"]))
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: expected an object with the key "prompt"'
            ) from error
    if not texts:
        raise ValueError(f"{path} has no prompt")
    return texts


def end_token_ids(model: PreTrainedModel) -> list[int]:
    """Ids that end an answer of a model."""
    ids = model.generation_config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def generate_answers(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 256,
) -> Answered:
    """A target's answers, in the order of the prompts, with a progress bar.

    Args:
        model: The target.
        prompts: Token ids.
        max_tokens: Most tokens of an answer; one that is longer is cut there.
        temperature: 0 takes the most probable token.
        seed: Seed of the sampling.
        batch_size: Prompts per call; those of similar length go together.
    """
    import torch
    from tqdm import tqdm

    torch.manual_seed(seed)
    ends = set(end_token_ids(model))
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    with tqdm(total=len(prompts), desc="target's answers", unit="prompt") as progress:
        for first in range(0, len(prompts), batch_size):
            chosen = order[first : first + batch_size]
            ids, mask = pad_left([prompts[index] for index in chosen])
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_tokens,
                pad_token_id=min(ends, default=0),
                **sampling,
            )
            for index, row in zip(
                chosen, output[:, ids.shape[1] :].tolist(), strict=True
            ):
                stop = next((i + 1 for i, t in enumerate(row) if t in ends), len(row))
                answers[index] = row[:stop]
            progress.update(len(chosen))
    return Answered(prompts, answers)


_RECORDED = "recorded answers"

_Texts = Annotated[
    list[Annotated[list[Annotated[int, Field(ge=0)]], FailFast()]], FailFast()
]


class RecordedAnswers(BaseModel):
    """The file of `recorded_answers`."""

    made_with: dict[str, Any]
    """The arguments that the answers depend on."""
    prompts: _Texts
    """Token ids."""
    answers: _Texts
    """The target's answers, in the order of the prompts."""

    @model_validator(mode="after")
    def _check_count(self) -> Self:
        if len(self.prompts) != len(self.answers):
            raise ValueError(
                f"answers: {len(self.answers)} of them for {len(self.prompts)} prompts"
            )
        return self

    def check_vocabulary(self, size: int, file: Path) -> None:
        """Refuse ids from `size` on.

        Raises:
            ValueError: there is one; the message names the file.
        """
        for name, rows in (("prompts", self.prompts), ("answers", self.answers)):
            largest = max((max(row, default=-1) for row in rows), default=-1)
            if largest >= size:
                reason = f"{name}: {largest} is outside the vocabulary of {size} tokens"
                raise BadFile(_RECORDED, file, reason)


def read_answers(file: Path) -> RecordedAnswers:
    """What `recorded_answers` kept.

    Raises:
        ValueError: it is no such file.
    """
    return read_json(file, _RECORDED, RecordedAnswers, 4096 * MIB)


def recorded_answers(
    file: Path | None,
    model: PreTrainedModel,
    name: str,
    *,
    prompts: str | Path | None,
    num_prompts: int,
    max_tokens: int,
    seed: int,
    temperature: float = 0.0,
    reuse: bool = True,
) -> Answered:
    """A target's answers to the prompts of `load_prompts`; made once, kept in a file.

    Args:
        file: Where the answers are kept; None keeps them nowhere.
        model: The target.
        name: Its folder, hub id or alias.
        prompts: As in `load_prompts`, as are `num_prompts` and `seed`.
        max_tokens: As in `generate_answers`, as is `temperature`.
        reuse: Take the file's answers if it was made with these arguments.

    Raises:
        ValueError: the prompts are none, or `max_tokens` or `temperature` is out of
            range.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, not {temperature}")
    made_with = {
        "target": name,
        "prompts": None if prompts is None else str(prompts),
        "num_prompts": num_prompts,
        "max_tokens": max_tokens,
        "seed": seed,
        "temperature": temperature,
    }
    if file is not None and reuse and file.exists():
        kept = read_answers(file)
        kept.check_vocabulary(model.config.vocab_size, file)
        if kept.made_with == made_with:
            return Answered(kept.prompts, kept.answers)
    rows = load_prompts(prompts, load_tokenizer(name), num_prompts, seed)
    answered = generate_answers(
        model, rows, max_tokens=max_tokens, temperature=temperature, seed=seed
    )
    if file is not None:
        # Token ids are text: what was asked and answered is not for everyone.
        content = {"made_with": made_with, **asdict(answered)}
        write_json(file, content, indent=None, private=True)
    return answered


def pad_left(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [rows, length]; 0 and 0 left of short rows."""
    import torch

    length = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def pad_right(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows, length], 0 right of short rows, and bool where there are any."""
    import torch

    length = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return ids, torch.arange(length) < torch.tensor([[len(row)] for row in rows])
