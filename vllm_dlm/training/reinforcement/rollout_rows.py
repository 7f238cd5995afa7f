# SPDX-License-Identifier: Apache-2.0
"""Rolled-out answers: rows of tokens, and the step that wrote each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RollOuts:
    """Answers and how they came about: R rows of at most L tokens, left-aligned.

    No decoder here rewrites, so that the step of each token says what every canvas was.
    """

    ids: Tensor
    """[R, L] int64: prompt, then the canvas after the last step."""
    prompt_lengths: Tensor
    """[R] int64."""
    valid: Tensor
    """[R, L] bool: False behind a row's canvas."""
    steps: Tensor
    """[R, L] int64: the step that wrote each token; -1 in the prompt, behind the canvas
    and where nothing was written."""
    logprobs: Tensor
    """[R, L] float32: natural logarithm of each token's untempered probability in that
    step; 0 where nothing was written."""
    mask_id: int
    first_entropy: Tensor | None = None
    """[R] float32: mean entropy of the first step's masks, in nats; None where the
    decoder does not say."""

    @property
    def response(self) -> Tensor:
        """[R, L] bool: the canvas."""
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (columns >= self.prompt_lengths[:, None]) & self.valid

    @property
    def num_steps(self) -> int:
        """Steps of the row that took most."""
        return int(self.steps.max()) + 1

    def canvas(self, step: int) -> Tensor:
        """[R, L] int64: the rows as they were before a step."""
        open_ = self.response & ((self.steps >= step) | (self.steps < 0))
        return self.ids.masked_fill(open_, self.mask_id)

    def written(self, step: int) -> Tensor:
        """[R, L] bool: what a step has written."""
        return self.steps == step

    def to_end(self, end_id: int) -> Tensor:
        """[R, L] bool: the answers, up to and with the first end."""
        ends = (self.ids == end_id) & self.response
        before = ends.cumsum(1) - ends.long()
        return self.response & (before == 0)

    def answers(self, end_id: int) -> list[list[int]]:
        """Token ids of each answer, without its end."""
        is_text = self.to_end(end_id) & (self.ids != end_id)
        return [ids[text].tolist() for ids, text in zip(self.ids, is_text, strict=True)]

    def take(self, rows: Tensor) -> RollOuts:
        """Some rows, by their numbers ([n] int64) or as a [R] bool tensor."""
        entropy = self.first_entropy
        return RollOuts(
            ids=self.ids[rows],
            prompt_lengths=self.prompt_lengths[rows],
            valid=self.valid[rows],
            steps=self.steps[rows],
            logprobs=self.logprobs[rows],
            mask_id=self.mask_id,
            first_entropy=None if entropy is None else entropy[rows],
        )


def empty_rows(
    prompts: Sequence[Sequence[int]],
    canvas: int,
    mask_id: int,
    end_id: int,
    device: torch.device,
) -> RollOuts:
    """Prompts, each with a canvas of masks behind it, and no step done."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    length = int(lengths.max()) + canvas
    ids = torch.full((len(prompts), length), end_id)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        ids[row, len(prompt) : len(prompt) + canvas] = mask_id
    valid = torch.arange(length) < lengths[:, None] + canvas
    return RollOuts(
        ids=ids.to(device),
        prompt_lengths=lengths.to(device),
        valid=valid.to(device),
        steps=torch.full((len(prompts), length), -1, device=device),
        logprobs=torch.zeros((len(prompts), length), device=device),
        mask_id=mask_id,
    )


def concatenate(parts: Sequence[RollOuts], end_id: int) -> RollOuts:
    """Roll-outs one below the other; shorter rows are padded."""
    width = max(part.ids.shape[1] for part in parts)

    def column(name: str, fill: float) -> Tensor:
        return torch.cat(
            [
                F.pad(values, (0, width - values.shape[1]), value=fill)
                for values in (getattr(part, name) for part in parts)
            ]
        )

    entropies = [part.first_entropy for part in parts]
    known = [entropy for entropy in entropies if entropy is not None]
    return RollOuts(
        ids=column("ids", end_id),
        prompt_lengths=torch.cat([part.prompt_lengths for part in parts]),
        valid=column("valid", False),
        steps=column("steps", -1),
        logprobs=column("logprobs", 0.0),
        mask_id=parts[0].mask_id,
        first_entropy=torch.cat(known) if len(known) == len(parts) else None,
    )
