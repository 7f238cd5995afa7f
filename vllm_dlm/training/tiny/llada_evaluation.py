# SPDX-License-Identifier: Apache-2.0
"""Exact match of llada-tiny on held-out problems, by a plain decoder.

That is LLaDA's static low-confidence decoding (arXiv 2502.09992): blocks from left to
right, a fixed number of the surest tokens at each step.
"""

from __future__ import annotations

import torch

from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.evaluation import exact_match
from vllm_dlm.training.tiny.llada_modeling import LLaDAModel


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
    mask_id, eos_id = tokenizer.MASK_ID, tokenizer.EOS_ID
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
