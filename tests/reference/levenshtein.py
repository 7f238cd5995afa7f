# SPDX-License-Identifier: Apache-2.0
"""LLaDA2.2's decoding loop in plain lists: masks filled, tokens changed and moved.

Written from descriptions of the loop that comes with LLaDA2.2's checkpoints (two ports
of it, and SGLang's JointThresholdInDel); imports nothing of the package. Three things
are settled as vllm_dlm settles them: the mask id is never predicted; a step that would
repeat the block's past replaces its least confident change (the published loop draws
one) by the next best text; and a block ends after 2 B + max_post_steps steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from reference.network import TinyModel, block_causal
from reference.procedures import row_statistics

MASK = -1
"""Stands for a mask in lists of tokens."""


@dataclass
class EditedBlock:
    """One block of a text, and what must be known of its past."""

    tokens: list[int]
    """`MASK` where masked."""
    prompt: int
    """The first so many tokens are the prompt's."""
    delete: int
    insert: int
    most_steps: int
    max_post_steps: int = 16
    mask_threshold: float = 0.5
    edit_threshold: float = 0.0
    original: list[bool] = field(default_factory=list)
    post_steps: int = 0
    step_number: int = 0
    seen: list[list[int]] = field(default_factory=list)
    is_over: bool = False
    events: set[str] = field(default_factory=set)
    """What has happened: a test that sees nothing of it shows nothing."""

    def __post_init__(self) -> None:
        self.original = [True] * len(self.tokens)

    def step(
        self,
        best: list[int],
        confidence: list[float],
        other: list[int],
    ) -> None:
        """One step; numbers are compared as float32.

        Args:
            best: the model's tokens.
            confidence: their probabilities.
            other: the best besides these, `delete` and `insert`.
        """
        old, output = list(self.tokens), range(self.prompt, len(self.tokens))
        masks = [i for i in output if old[i] == MASK]
        first = [i for i in masks if self.original[i]]
        self.post_steps = 0 if first else self.post_steps + 1
        self.step_number += 1
        ends = (
            self.post_steps >= self.max_post_steps
            or self.step_number >= self.most_steps
        )

        fill = [i for i in masks if confidence[i] > float32(self.mask_threshold)]
        fewest = 1 + len(masks) - len(first)
        if len(fill) < fewest:
            fill = sorted(masks, key=lambda i: (-confidence[i], i))[:fewest]
        if not first or ends:
            fill = masks
        change = [
            i
            for i in output
            if i not in masks
            and confidence[i] > float32(self.edit_threshold)
            and best[i] != old[i]
        ]
        placed = list(old)
        for i in [*fill, *change]:
            placed[i] = best[i]
            if ends and best[i] in (self.delete, self.insert):
                placed[i] = other[i]
                self.events.add("text instead of an edit")
        changed = [i for i in output if placed[i] != old[i]]
        if placed in self.seen and changed and not ends:
            weakest = min(changed, key=lambda i: (confidence[i], i))
            placed[weakest] = other[weakest]
            self.events.add("repeated")
        self.seen.append(list(placed))

        moved: list[tuple[int, bool]] = []
        for i in output:
            if placed[i] == self.delete and i in [*fill, *change]:
                self.events.add("deleted")
            elif placed[i] == self.insert and i in [*fill, *change]:
                self.events.add("inserted")
                moved += [(MASK, False), (old[i], self.original[i])]
            else:
                moved.append((placed[i], self.original[i]))
        moved += [(MASK, False)] * len(output)
        moved = moved[: len(output)]
        self.tokens[self.prompt :] = [token for token, _ in moved]
        self.original[self.prompt :] = [mark for _, mark in moved]
        is_stable = self.tokens == old and MASK not in old[self.prompt :]
        self.is_over = is_stable or ends
        if ends and not is_stable:
            self.events.add("cut short")


def generate_levenshtein(
    model: TinyModel,
    prompt_ids: list[int],
    *,
    max_tokens: int,
    block_length: int,
    max_model_len: int = 1 << 30,
    stops: bool = True,
    events: set[str] | None = None,
    observe: Callable[[float], None] | None = None,
    **rule: float,
) -> tuple[list[int], int]:
    """Decode one request greedily: its tokens, at most `max_tokens`, and the forwards.

    Blocks are counted from position 0; the prompt's last tokens share the first one.

    Args:
        stops: the text ends with its first end-of-text token, when that block is over.
        events: gets the events of all blocks.
        observe: called after each forward with about the least change of a probability
            that would have led to another decision.
        rule: parameters of `EditedBlock`.
    """
    edits = (model.config["delete_token_id"], model.config["split_token_id"])
    row = list(prompt_ids)
    forwards = 0
    while len(row) < min(len(prompt_ids) + max_tokens, max_model_len):
        start = len(row) // block_length * block_length
        end = min(start + block_length, max_model_len)
        most_steps = 2 * block_length + int(rule.get("max_post_steps", 16))
        known = row[start:]
        block = EditedBlock(
            [*known, *[MASK] * (end - start - len(known))],
            len(known) if start < len(prompt_ids) else 0,
            *edits,
            most_steps,
            **rule,  # type: ignore[arg-type]
        )
        while not block.is_over:
            inputs = [model.mask_id if t == MASK else t for t in block.tokens]
            visible = block_causal(end, block_length)
            logits = model.forward(row[:start] + inputs, visible=visible)[start:]
            forwards += 1
            found = row_statistics(logits, model.mask_id)
            text = logits.clone()
            text[:, [model.mask_id, *edits]] = -torch.inf
            text.scatter_(1, found.argmax[:, None], -torch.inf)
            if observe is not None:
                observe(closest(block, found, text))
            block.step(
                found.argmax.tolist(),
                found.confidence.tolist(),
                text.argmax(dim=1).tolist(),
            )
        if events is not None:
            events |= block.events
        row[start:] = block.tokens
        output = row[len(prompt_ids) :]
        if stops and model.eos_id in output:
            return output[: output.index(model.eos_id) + 1][:max_tokens], forwards
    return row[len(prompt_ids) :][:max_tokens], forwards


def closest(block: EditedBlock, found: object, text: torch.Tensor) -> float:
    """The least difference that a decision of the next step may rest on."""
    sure, margin = found.confidence, found.margin  # type: ignore[attr-defined]
    output = range(block.prompt, len(block.tokens))
    masks = sorted(float(sure[i]) for i in output if block.tokens[i] == MASK)
    gaps = [b - a for a, b in zip(masks, masks[1:], strict=False)]
    probable = text.softmax(dim=1).topk(2, dim=1).values
    for i in output:
        is_mask = block.tokens[i] == MASK
        bound = block.mask_threshold if is_mask else block.edit_threshold
        gaps += [abs(float(sure[i]) - bound), float(margin[i])]
        gaps.append(float(probable[i, 0] - probable[i, 1]))
    return min(gaps)


def float32(number: float) -> float:
    return float(torch.tensor(number))
