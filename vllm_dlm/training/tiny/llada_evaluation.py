# SPDX-License-Identifier: Apache-2.0
"""Exact match of llada-tiny on held-out problems, by a plain decoder.

That is LLaDA's static low-confidence decoding (arXiv 2502.09992): blocks from left to
right, a fixed number of the surest tokens at each step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.evaluation import exact_match
from vllm_dlm.training.tiny.llada_modeling import LLaDAModel


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
    return fill_masks(
        model,
        [(prompt, [tokenizer.MASK_ID] * canvas) for prompt in prompts],
        mask_id=tokenizer.MASK_ID,
        eos_id=tokenizer.EOS_ID,
        block_length=block_length,
        tokens_per_step=tokens_per_step,
    )


@torch.inference_mode()
def fill_masks(
    model: LLaDAModel,
    rows: Sequence[tuple[list[int], list[int]]],
    *,
    mask_id: int,
    eos_id: int | None,
    block_length: int = 32,
    tokens_per_step: int = 1,
) -> list[list[int]]:
    """Canvases with the masks filled in, token ids of each row.

    Args:
        model: The model.
        rows: Token ids of a prompt and of its canvas, with masks.
        mask_id: Token id of the mask.
        eos_id: Stop after the first block behind which every row has this token; None
            to fill all blocks.
        block_length: Length of a block.
        tokens_per_step: Tokens committed per forward pass and row.
    """
    starts = torch.tensor([len(prompt) for prompt, _ in rows])
    ends = torch.tensor([len(prompt) + len(canvas) for prompt, canvas in rows])
    widest = int((ends - starts).max())
    blocks = range(0, widest, block_length)
    # Room for the last block of every row, which may end behind the row.
    length = int(starts.max()) + blocks[-1] + block_length
    ids = torch.full((len(rows), length), eos_id or 0)
    for row, (prompt, canvas) in enumerate(rows):
        ids[row, : len(prompt) + len(canvas)] = torch.tensor(prompt + canvas)
    valid = torch.arange(length) < ends[:, None]
    for first in blocks:
        columns = starts[:, None] + first + torch.arange(block_length)
        while True:
            block = ids.gather(1, columns)
            masked = (block == mask_id) & (columns < ends[:, None])
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
        in_canvas = (torch.arange(length) >= starts[:, None]) & valid
        if eos_id is not None and ((ids == eos_id) & in_canvas).any(1).all():
            break
    return [
        row[start:end].tolist()
        for row, start, end in zip(ids, starts, ends, strict=True)
    ]


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
