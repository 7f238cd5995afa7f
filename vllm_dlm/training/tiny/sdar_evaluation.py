# SPDX-License-Identifier: Apache-2.0
"""Exact match of sdar-tiny on held-out problems, by a plain decoder without a cache."""

from __future__ import annotations

import torch

from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.evaluation import exact_match
from vllm_dlm.training.block_causal import BlockCausalModel


@torch.inference_mode()
def decode_blocks(
    model: BlockCausalModel, prompts: list[list[int]], *, canvas: int
) -> list[list[int]]:
    """Canvas token ids of each prompt: block by block, in it the surest mask first.

    Decoding stops when every row has its <|endoftext|> in a block that is full; what
    is behind it may still be masked.

    Args:
        model: The model; its blocks are counted from the prompt's first token.
        prompts: Token ids of the prompts.
        canvas: Number of tokens to generate.
    """
    block_length = model.attention_block
    assert block_length is not None
    starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    length = int(starts.max()) + canvas
    ids = torch.full((len(prompts), length), tokenizer.EOS_ID)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    places = torch.arange(length)
    in_canvas = (places >= starts) & (places < starts + canvas)
    ids.masked_fill_(in_canvas, tokenizer.MASK_ID)
    while True:
        masks = ids == tokenizer.MASK_ID
        # The block of each row's first mask; of a finished row, none.
        frontier = torch.where(masks.any(1), masks.int().argmax(1), length)
        active = (frontier // block_length)[:, None]
        written = in_canvas & (places // block_length < active)
        finished = (written & (ids == tokenizer.EOS_ID)).any(1) | ~masks.any(1)
        if finished.all():
            break
        width = int((active[~finished].max() + 1) * block_length)
        candidates = masks & (places // block_length == active) & ~finished[:, None]
        # What is right of the active block is not seen.
        logits = model(ids[:, :width], (places < starts + canvas)[:, :width])
        logits[:, :, tokenizer.MASK_ID] = float("-inf")
        confidence, tokens = logits.softmax(-1).max(-1)
        confidence = confidence.masked_fill(~candidates[:, :width], -1.0)
        rows = (~finished).nonzero()[:, 0]
        surest = confidence.argmax(1)[rows]
        ids[rows, surest] = tokens[rows, surest]
    return [
        row[start : start + canvas].tolist()
        for row, [start] in zip(ids, starts.tolist(), strict=True)
    ]


def evaluate_model(
    model: BlockCausalModel,
    num_problems: int,
    *,
    canvas: int = 32,
    seed: int = 0,
    tasks: list[str] | None = None,
) -> dict[str, float]:
    """Exact match of static decoding per task, and over all as "all"."""
    was_training = model.training
    model.eval()
    shares = exact_match(
        lambda prompts: decode_blocks(model, prompts, canvas=canvas),
        num_problems,
        seed=seed,
        tasks=tasks,
    )
    model.train(was_training)
    return shares
