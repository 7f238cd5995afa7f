# SPDX-License-Identifier: Apache-2.0
"""What llada-tiny-t2t learns from: canvases as a parallel writer leaves them.

A row begins with masks, as in `llada_tiny`. In most rows the model itself then writes
many tokens at once, from one forward, which is where wrong tokens come from, and in
some of them it edits what it has written once. In the other rows tokens are replaced
by drawn ones (LLaDA2.1, arXiv 2602.08676). What has to be answered is the right answer
that is nearest to what stands there.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.problems import FREE_TASKS, Problem, sample_problem
from vllm_dlm.training.tiny.edit_targets import nearest_names
from vllm_dlm.training.tiny.llada_tiny import (
    LONG_PADDING_SUM,
    MIDDLE_ROWS,
    NUM_FULL_EOS,
    PADDING_WEIGHT,
    SHORT_ROWS,
    make_batch,
)
from vllm_dlm.training.tiny.masking import Batch

# Tokens of a step: rows with masks alone, so that nothing is forgotten, and rows to
# edit; what they count.
MASK_TOKENS, EDIT_TOKENS = 640, 1408
MASK_SHARE = 0.2
LENGTHS = (*SHORT_ROWS, *SHORT_ROWS, 80)
MIDDLE_SHARE = 0.1
BLOCK_LENGTH = 32
# Of the rows to edit: how many ask a task with several right answers; begin with
# nothing but masks; are written by the model; and then edited by it once.
FREE_SHARE, ALL_MASKED, ON_POLICY, EDITED = 0.7, 0.6, 0.8, 0.35
# Of the rows that the model writes: how many it writes whole, the rest where its
# probability is above one drawn up to a limit; how many with drawn tokens, the rest
# with the best ones; how many beyond the first block.
WHOLE, HIGHEST_THRESHOLD, DRAWN, BEYOND = 0.5, 0.7, 0.5, 0.3
REPLACED = 0.15
# What a token counts that is right already, where others count 1.
KEPT_WEIGHT = 0.5


@dataclass(frozen=True)
class Rows:
    """Questions with an answer each, and <|endoftext|> to the rows' end.

    Args:
        ids: Token ids [rows, length].
        problems: The problem of each row.
        starts: Where its answer begins.
        ends: Where its answer ends, <|endoftext|> not counted.
    """

    ids: Tensor
    problems: list[Problem]
    starts: list[int]
    ends: list[int]

    @property
    def in_canvas(self) -> Tensor:
        return torch.arange(self.ids.shape[1]) >= torch.tensor(self.starts)[:, None]

    @property
    def in_answer(self) -> Tensor:
        """With the first <|endoftext|>s."""
        end = torch.tensor(self.ends)[:, None] + NUM_FULL_EOS
        return self.in_canvas & (torch.arange(self.ids.shape[1]) < end)


def make_batches(forward: Callable[..., Any], step: int, seed: int) -> list[Batch]:
    """What a step learns from: rows with masks, and rows to edit.

    Args:
        forward: The model in its present state.
        step: Number of the step.
        seed: Seed of the run.
    """
    rng = random.Random(f"llada-tiny-t2t-{seed}-{step}")
    length = rng.choice(LENGTHS)
    long = rng.choice(MIDDLE_ROWS) if rng.random() < MIDDLE_SHARE else length
    masks = make_batch(rng, MASK_TOKENS // long + 1, long, LONG_PADDING_SUM)
    edits = edit_batch(forward, rng, EDIT_TOKENS // length, length)
    return [_weighing(masks, MASK_SHARE), _weighing(edits, 1 - MASK_SHARE)]


def edit_batch(
    forward: Callable[..., Any], rng: random.Random, num_rows: int, length: int
) -> Batch:
    """Rows of prompt, answer and padding in which something is wrong.

    Args:
        forward: The model in its present state; no gradient is kept.
        rng: Where all is drawn from.
        num_rows: Number of rows.
        length: Their length.
    """
    rows = draw_rows(rng, num_rows, length)
    generator = torch.Generator().manual_seed(rng.getrandbits(62))

    def some(share: float) -> Tensor:
        """Bool [rows, 1], True in so many rows."""
        return torch.rand((num_rows, 1), generator=generator) < share

    masked = _masks(rows, some, generator)
    inputs = rows.ids.masked_fill(masked, tokenizer.MASK_ID)
    own = some(ON_POLICY)
    places = torch.arange(length)
    begun = places < torch.tensor(rows.starts)[:, None] + BLOCK_LENGTH
    threshold = HIGHEST_THRESHOLD * torch.rand(num_rows, 1, generator=generator)
    written = write(
        forward,
        inputs,
        begun | some(BEYOND),
        threshold.masked_fill(some(WHOLE), 0.0),
        some(DRAWN),
        generator,
    )
    twice = (own & some(EDITED))[:, 0]
    if twice.any():
        written[twice] = edit(forward, written[twice], rows.in_canvas[twice])
    inputs = torch.where(own, written, _replace(inputs, rows, generator))
    targets = nearest_targets(rows, inputs, rng)
    weights = torch.where(rows.in_answer, 1.0, PADDING_WEIGHT) * rows.in_canvas
    weights = torch.where(inputs == targets, KEPT_WEIGHT, 1.0) * weights
    return Batch(targets, inputs, weights)


def draw_rows(rng: random.Random, num_rows: int, length: int) -> Rows:
    """Problems of the training split, most of them with several right answers."""
    ids = torch.full((num_rows, length), tokenizer.EOS_ID)
    rows = Rows(ids, [], [], [])
    for row in range(num_rows):
        is_free = rng.random() < FREE_SHARE
        problem = sample_problem(rng, tasks=FREE_TASKS if is_free else None)
        prompt = tokenizer.encode_prompt(problem.question, rng.random() < 0.5)
        tokens = prompt + tokenizer.encode(problem.answer)
        ids[row, : len(tokens)] = torch.tensor(tokens)
        rows.problems.append(problem)
        rows.starts.append(len(prompt))
        rows.ends.append(len(tokens))
    return rows


@torch.no_grad()
def best_tokens(forward: Callable[..., Any], inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [rows, length, vocab] without the mask's, and the best tokens."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = forward(inputs, None)
    logits = logits.float()
    logits[..., tokenizer.MASK_ID] = float("-inf")
    return logits.softmax(-1), logits.argmax(-1)


def write(
    forward: Callable[..., Any],
    inputs: Tensor,
    begun: Tensor,
    threshold: Tensor,
    draws: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Inputs [rows, length] with many of the masks written, from one forward.

    Args:
        forward: The model in its present state.
        inputs: Token ids with masks [rows, length].
        begun: Bool [rows, length], where masks may be written.
        threshold: Least probability of what is written [rows, 1].
        draws: Bool [rows, 1], True where tokens are drawn, not the best ones.
        generator: Where they are drawn from.
    """
    probabilities, best = best_tokens(forward, inputs)
    flat = probabilities.flatten(0, 1)
    drawn = torch.multinomial(flat, 1, generator=generator).view_as(best)
    sure = begun & (probabilities.amax(-1) >= threshold)
    tokens = torch.where(draws, drawn, best)
    return torch.where((inputs == tokenizer.MASK_ID) & sure, tokens, inputs)


def edit(forward: Callable[..., Any], inputs: Tensor, in_canvas: Tensor) -> Tensor:
    """Inputs [rows, length] with the best token in place of each written one."""
    _, best = best_tokens(forward, inputs)
    return torch.where(in_canvas & (inputs != tokenizer.MASK_ID), best, inputs)


def nearest_targets(rows: Rows, inputs: Tensor, rng: random.Random) -> Tensor:
    """Token ids [rows, length] of the right answers nearest to what is written."""
    targets = rows.ids.clone()
    for row, problem in enumerate(rows.problems):
        if problem.task not in FREE_TASKS:
            continue
        # A list is [ name , name ... ]: every other token is a name.
        names = slice(rows.starts[row] + 1, rows.ends[row], 2)
        written = [
            None if token == tokenizer.MASK_ID else tokenizer.decode([token])
            for token in inputs[row, names].tolist()
        ]
        right = nearest_names(problem, written, rng)
        ids = [tokenizer.TOKEN_IDS[name] for name in right]
        targets[row, names] = torch.tensor(ids)
    return targets


def _masks(
    rows: Rows, some: Callable[[float], Tensor], generator: torch.Generator
) -> Tensor:
    """Bool [rows, length]: masks of the answers, and apart from them of the padding."""

    def shares() -> Tensor:
        share = torch.rand((len(rows.ids), 1), generator=generator)
        return share.masked_fill(some(ALL_MASKED), 1.0)

    share = torch.where(rows.in_answer, shares(), shares())
    return (torch.rand(rows.ids.shape, generator=generator) < share) & rows.in_canvas


def _replace(inputs: Tensor, rows: Rows, generator: torch.Generator) -> Tensor:
    """Inputs with some of the answers' tokens replaced by drawn ones.

    Half of these are any, half are tokens of the row itself.
    """
    shape, length = inputs.shape, inputs.shape[1]
    first, last = len(tokenizer.SPECIAL_TOKENS), len(tokenizer.VOCABULARY)
    anything = torch.randint(first, last, shape, generator=generator)
    places = torch.randint(length, shape, generator=generator)
    own = rows.ids.gather(1, places)
    from_row = torch.rand(shape, generator=generator) < 0.5
    replaced = torch.rand(shape, generator=generator) < REPLACED
    replaced &= rows.in_answer & (inputs != tokenizer.MASK_ID)
    return torch.where(replaced, torch.where(from_row, own, anything), inputs)


def _weighing(batch: Batch, weight: float) -> Batch:
    """The batch with weights whose sum is `weight`."""
    total = batch.weights.sum().clamp(min=1e-9)
    return Batch(batch.ids, batch.inputs, weight * batch.weights / total, batch.valid)
