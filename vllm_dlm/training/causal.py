# SPDX-License-Identifier: Apache-2.0
"""An autoregressive model that learns from its own answers to do with less compute.

What the trainings of `lud` and of layer skipping share: the network and its unchanged
twin, batches of answered prompts, the loss that keeps the texts as they are, what is
measured, and the folder that is written. Any causal language model of transformers
will do whose tensors have the same names in its folder and in transformers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_dlm.files.model_folders import stored_dtypes
from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.evaluation import exact_match
from vllm_dlm.training.causal_options import CausalOptions
from vllm_dlm.training.drafters.deer_data import kept_prompts
from vllm_dlm.training.drafters.teacher import (
    Answered,
    generate_answers,
    load_causal_lm,
    load_tokenizer,
    pad_right,
    recorded_answers,
)
from vllm_dlm.training.learner import model_folder
from vllm_dlm.training.weights import sizes_of, write_like

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Task:
    """A model to fine-tune, and what it is fine-tuned on."""

    network: PreTrainedModel
    """In training mode, all of its parameters with gradients."""
    teacher: PreTrainedModel
    """The same model, frozen."""
    source: Path
    """The model's folder."""
    taught: Answered
    """The teacher's greedy answers."""
    shown: Answered
    """Those of prompts that are kept out of the training."""

    def batch(self, seed: str, rows: int) -> Rows:
        """`rows` answered prompts, drawn from `seed`."""
        rng = random.Random(seed)
        chosen = [rng.randrange(len(self.taught.prompts)) for _ in range(rows)]
        prompts = [self.taught.prompts[index] for index in chosen]
        texts = [
            prompt + self.taught.answers[index]
            for prompt, index in zip(prompts, chosen, strict=True)
        ]
        ids, _ = pad_right(texts)
        device = self.network.device
        return Rows(
            ids.to(device),
            torch.tensor([len(prompt) for prompt in prompts], device=device),
            torch.tensor([len(text) for text in texts], device=device),
        )

    def save(self, output_dir: str | Path, entries: Mapping[str, Any]) -> None:
        """Write the network as a folder like its source, config.json with `entries`.

        Raises:
            ValueError: the source has tensors that transformers gave other names.
        """
        stored = stored_dtypes(self.source)
        tensors = {
            name: tensor
            for name, tensor in self.network.state_dict().items()
            if name in stored  # not what is tied to another
        }
        if missing := stored.keys() - tensors.keys():
            raise ValueError(
                f"{self.source} has the tensor {min(missing)!r}, which transformers "
                "calls otherwise: this model cannot be written"
            )
        write_like(
            tensors.items(), sizes_of(tensors), self.source, output_dir, config=entries
        )


@dataclass(frozen=True)
class Rows:
    """R answered prompts, left-aligned, T tokens wide."""

    ids: torch.Tensor
    """[R, T] int64, 0 behind a text."""
    starts: torch.Tensor
    """[R] int64: tokens of the prompt."""
    ends: torch.Tensor
    """[R] int64: tokens of prompt and answer."""

    @property
    def predicts(self) -> torch.Tensor:
        """[R, T] bool: where a token of the answer is predicted."""
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (place >= self.starts[:, None] - 1) & (place < self.ends[:, None] - 1)


def load_task(
    options: CausalOptions, output_dir: str | Path, *, seed: int, reuse: bool
) -> Task:
    """Load a model twice, and have it answer its prompts.

    Args:
        options: What to fine-tune, and on what.
        output_dir: Folder in which the answers are kept.
        seed: Of the prompts.
        reuse: Take the answers that are there, if they were made with the same.

    Raises:
        ValueError: no such model, too few prompts, or a value out of its range.
    """
    source = model_folder(options.model)
    teacher = load_causal_lm(str(source), options.device)
    network = load_causal_lm(str(source), options.device).requires_grad_(True).train()
    answered = recorded_answers(
        Path(output_dir) / "answers.json",
        teacher,
        options.model,
        prompts=options.prompts,
        num_prompts=options.num_prompts,
        max_tokens=options.max_tokens,
        seed=seed,
        reuse=reuse,
    )
    kept = kept_prompts(len(answered.prompts))
    shown = Answered(answered.prompts[:kept], answered.answers[:kept])
    taught = Answered(answered.prompts[kept:], answered.answers[kept:])
    if not taught.prompts:
        raise ValueError("a model needs at least 2 prompts to learn from")
    return Task(network, teacher, source, taught, shown)


def load_trained(options: CausalOptions, output_dir: str | Path, *, seed: int) -> Task:
    """The task of a training that is over, with the network that it has written."""
    task = load_task(options, output_dir, seed=seed, reuse=True)
    return replace(task, network=load_causal_lm(str(output_dir), options.device))


def distillation_loss(
    logits: torch.Tensor, taught: torch.Tensor, where: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy to the teacher's distributions: the texts stay what they were.

    Args:
        logits: [R, T or more, V].
        taught: [R, T, V] the teacher's logits.
        where: [R, T] bool: the positions that count.
    """
    ours = logits[:, : taught.shape[1]][where].float().log_softmax(-1)
    return -(taught[where].float().softmax(-1) * ours).sum(-1).mean()


@torch.inference_mode()
def plain_answers(network: PreTrainedModel, answered: Answered) -> list[list[int]]:
    """Greedy answers to the prompts, up to the longest of `answered`."""
    longest = max(map(len, answered.answers))
    return generate_answers(network, answered.prompts, max_tokens=longest).answers


def agreement(answers: list[list[int]], answered: Answered) -> float:
    """Share of answers that are those of the teacher, token for token."""
    pairs = zip(answers, answered.answers, strict=True)
    return sum(ours == theirs for ours, theirs in pairs) / len(answers)


def tasks_right(network: PreTrainedModel, num_problems: int) -> float | None:
    """Share of held-out built-in problems answered right, greedily.

    None for a model whose tokenizer is not that of the built-in models.
    """
    if load_tokenizer(network.name_or_path).get_vocab() != tokenizer.TOKEN_IDS:
        return None

    def decode(prompts: list[list[int]]) -> list[list[int]]:
        return generate_answers(network, prompts, max_tokens=32).answers

    return exact_match(decode, num_problems)["all"]


def in_evaluation(network: PreTrainedModel, measure: Callable[[], Any]) -> Any:
    """What `measure` returns, the network in evaluation mode meanwhile."""
    network.eval()
    try:
        return measure()
    finally:
        network.train()
