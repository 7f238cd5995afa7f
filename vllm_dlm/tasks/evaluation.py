# SPDX-License-Identifier: Apache-2.0
"""Exact match of llada-tiny on held-out problems: by a plain decoder, or served.

The plain one is LLaDA's static low-confidence decoding (arXiv 2502.09992): blocks from
left to right, a fixed number of the surest tokens at each step.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_dlm.tasks import problems as tiny_tasks
from vllm_dlm.tasks import tokenizer as tiny_tokenizer
from vllm_dlm.training.tiny.llada_modeling import LLaDAModel

if TYPE_CHECKING:
    from vllm import LLM


@torch.inference_mode()
def decode_static(
    model: LLaDAModel,
    prompts: list[list[int]],
    *,
    canvas: int,
    block_length: int = 32,
    tokens_per_step: int = 1,
) -> list[list[int]]:
    """Canvas token ids of each prompt.

    Decoding stops after the first block in which every row has its
    <|endoftext|>; the blocks behind it stay masked.

    Args:
        model: The model.
        prompts: Token ids of the prompts.
        canvas: Number of tokens to generate, a multiple of `block_length`.
        block_length: Length of a block.
        tokens_per_step: Tokens committed per forward pass and row.
    """
    if canvas % block_length:
        raise ValueError(f"canvas {canvas} is no multiple of block {block_length}")
    mask_id, eos_id = tiny_tokenizer.MASK_ID, tiny_tokenizer.EOS_ID
    starts = torch.tensor([len(prompt) for prompt in prompts])
    length = int(starts.max()) + canvas
    ids = torch.full((len(prompts), length), mask_id)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    valid = torch.arange(length) < starts[:, None] + canvas
    for first in range(0, canvas, block_length):
        columns = starts[:, None] + first + torch.arange(block_length)
        while True:
            block = ids.gather(1, columns)
            masked = block == mask_id
            if not masked.any():
                break
            logits = model(ids, valid)
            index = columns[:, :, None].expand(-1, -1, logits.shape[-1])
            logits = logits.gather(1, index)
            logits[:, :, mask_id] = float("-inf")
            confidence, tokens = logits.softmax(-1).max(-1)
            confidence = confidence.masked_fill(~masked, -1.0)
            count = min(tokens_per_step, block_length)
            surest = confidence.topk(count, dim=1).indices
            chosen = torch.zeros_like(masked).scatter_(1, surest, True) & masked
            ids.scatter_(1, columns, torch.where(chosen, tokens, block))
        canvas_columns = starts[:, None] + torch.arange(canvas)
        answers = ids.gather(1, canvas_columns)
        if (answers == eos_id).any(1).all():
            break
    return ids.gather(1, starts[:, None] + torch.arange(canvas)).tolist()


def evaluate_model(
    model: LLaDAModel,
    num_problems: int,
    *,
    canvas: int,
    block_length: int = 32,
    tokens_per_step: int = 1,
    seed: int = 0,
    tasks: list[str] | None = None,
) -> dict[str, float]:
    """Exact match of static decoding per task, and over all as "all"."""
    was_training = model.training
    model.eval()

    def decode(prompts: list[list[int]]) -> list[list[int]]:
        return decode_static(
            model,
            prompts,
            canvas=canvas,
            block_length=block_length,
            tokens_per_step=tokens_per_step,
        )

    shares = exact_match(decode, num_problems, seed=seed, tasks=tasks)
    model.train(was_training)
    return shares


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
    problems = tiny_tasks.sample_problems(num_problems, seed, "heldout", tasks)
    right: dict[str, list[bool]] = defaultdict(list)
    for first in range(0, len(problems), batch_size):
        batch = problems[first : first + batch_size]
        prompts = [
            tiny_tokenizer.encode_prompt(problem.question, chat=index % 2 == 0)
            for index, problem in enumerate(batch)
        ]
        for problem, answer in zip(batch, decode(prompts), strict=True):
            is_right = problem.check(tiny_tokenizer.decode(answer))
            right[problem.task].append(is_right)
            right["all"].append(is_right)
    order = [*tiny_tasks.TASKS, "all"]
    return {task: sum(right[task]) / len(right[task]) for task in order if right[task]}


@dataclass(frozen=True)
class Served:
    """What an engine made of a list of problems."""

    problems: int
    right: int
    forwards: int
    """Of all requests; one that several requests share counts for each of them."""
    tokens: int
    """Of all answers, up to the end of the text and with it."""
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
    problems: Sequence[tiny_tasks.Problem],
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


def load_model(model_dir: str | Path) -> LLaDAModel:
    """Load an exported model for evaluation.

    Raises:
        ValueError: its files are missing, or do not fit together.
    """
    from vllm_dlm.files.model_folders import (
        Config,
        check_room,
        check_weights,
        read_weights,
    )
    from vllm_dlm.training.tiny.llada_modeling import LLaDAShape

    config = Config(model_dir)
    shape = LLaDAShape(
        vocab_size=config.size("vocab_size"),
        d_model=config.size("d_model"),
        n_layers=config.layers("n_layers"),
        n_heads=config.size("n_heads"),
        mlp_hidden_size=config.size("mlp_hidden_size"),
        rope_theta=config.number("rope_theta"),
        rms_norm_eps=config.number("rms_norm_eps"),
        max_sequence_length=config.size("max_sequence_length"),
    )
    file = Path(model_dir) / "model.safetensors"
    tensors = read_weights(file)
    check_room(shape.num_parameters, tensors, config)
    model = LLaDAModel(shape)
    check_weights(tensors, model, file)
    names = model.state_dict()
    model.load_state_dict({name: tensors[name] for name in names})
    return model.eval()
