# SPDX-License-Identifier: Apache-2.0
"""What sdar-tiny learns from: questions and chats of several turns, in two streams.

The clean stream holds a whole text; the masked stream holds the blocks of its answers
only, since nothing else is ever guessed. A row is filled with as many texts as fit.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.problems import sample_problem

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.streams import Streams

BATCH_TOKENS = 3072
# Lengths of the rows and their shares; the long ones have chats of more turns.
ROWS = (128, 256, 512)
ROW_SHARES = (0.76, 0.18, 0.06)
MOST_TURNS = (2, 5, 12)
PLAIN_SHARE = 0.4
# A text that does not fit into what is left of a row gives way to another one, so
# often at most.
TRIES = 6
# The end token behind the answer counts like an answer's token, twice; what follows in
# its block is learnt at once.
NUM_FULL_EOS = 2
PADDING_WEIGHT = 0.1
# Below this share of masks, 1 / p would be all there is.
LEAST_MASKED = 0.1


@dataclass(frozen=True)
class Text:
    """One question or chat, in two streams.

    Args:
        clean: Token ids of the clean stream.
        masked: (token id, position, answer, loss weight) of each token of the masked
            stream, before it is masked; weight 0 for a prompt's token.
    """

    clean: list[int]
    masked: list[tuple[int, int, int, float]]

    def __len__(self) -> int:
        return len(self.clean) + len(self.masked)


def make_text(rng: random.Random, block_length: int, most_turns: int) -> Text:
    """Draw a plain question, or a chat of up to `most_turns` turns.

    Args:
        rng: Where problems are drawn from.
        block_length: Tokens per block, counted from the text's start.
        most_turns: Most turns of a chat.
    """
    turns: list[tuple[list[int], list[int]]] = []
    if rng.random() < PLAIN_SHARE:
        problem = sample_problem(rng)
        prompt = tokenizer.encode_prompt(problem.question, chat=False)
        turns.append((prompt, tokenizer.encode(problem.answer)))
    else:
        for turn in range(rng.randint(1, most_turns)):
            problem = sample_problem(rng)
            prompt = tokenizer.encode_prompt(problem.question, chat=True)
            # Only the first message of a chat begins with <|startoftext|>.
            turns.append((prompt[turn > 0 :], tokenizer.encode(problem.answer)))
    return lay_out_turns(turns, block_length)


def lay_out_turns(turns: list[tuple[list[int], list[int]]], block_length: int) -> Text:
    """The two streams of the turns of a chat, or of one plain question.

    In the chat's history an answer ends with <|eot_id|>; the model ends it with
    <|endoftext|>, up to the end of the block.

    Args:
        turns: Prompt and answer of each turn; the prompts with the chat's headers.
        block_length: Tokens per block.
    """
    eos = tokenizer.EOS_ID
    clean: list[int] = []
    masked: list[tuple[int, int, int, float]] = []
    last_block = 0
    for number, (prompt, answer) in enumerate(turns):
        clean += prompt
        start, end = len(clean), len(clean) + len(answer)
        first = start // block_length * block_length
        last_block = end // block_length * block_length
        padding = [eos] * (last_block + block_length - end)
        weights = [1.0] * min(len(padding), NUM_FULL_EOS)
        weights += [PADDING_WEIGHT] * (len(padding) - len(weights))
        ids = clean[first:] + answer + padding
        loss = [0.0] * (start - first) + [1.0] * len(answer) + weights
        masked += [
            (token, first + place, number, weight)
            for place, (token, weight) in enumerate(zip(ids, loss, strict=True))
        ]
        clean += [*answer, tokenizer.TOKEN_IDS[tokenizer.EOT]]
    # Nobody sees the clean tokens of the last answer's last block.
    return Text(clean[:last_block], masked)


def make_batch(step: int, seed: int, block_length: int) -> Streams:
    """Rows of texts with masks, a function of the step and the seed alone."""
    import torch

    rng = random.Random(f"sdar-tiny-{seed}-{step}")
    [kind] = rng.choices(range(len(ROWS)), ROW_SHARES)
    length, most_turns = ROWS[kind], MOST_TURNS[kind]
    rows = [
        fill_row(rng, length, block_length, most_turns)
        for _ in range(BATCH_TOKENS // length)
    ]
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    return mask_rows(rows, length, block_length, generator)


def fill_row(
    rng: random.Random, length: int, block_length: int, most_turns: int
) -> list[Text]:
    """Draw texts that fit into a row together."""
    texts: list[Text] = []
    room, tries = length, TRIES
    while tries:
        text = make_text(rng, block_length, most_turns)
        if len(text) <= room:
            texts.append(text)
            room -= len(text)
        else:
            tries -= 1
    return texts


def mask_rows(
    rows: list[list[Text]], length: int, block_length: int, generator: torch.Generator
) -> Streams:
    """Put texts into rows and mask a part of every block of the masked stream.

    Each block has its own share of masks p = t + (1 - t) LEAST_MASKED, where the t of
    all blocks are spread evenly over 0 to 1; a mask counts 1 / p, and all tokens of the
    answers, masked or not, count 1 in the mean together.
    """
    import torch

    from vllm_dlm.training.streams import CLEAN, NO_TEXT, Streams

    shape = (len(rows), length)
    targets = torch.full(shape, tokenizer.EOS_ID)
    positions = torch.zeros(shape, dtype=torch.long)
    texts, copies = torch.full(shape, NO_TEXT), torch.full(shape, CLEAN)
    weights = torch.zeros(shape)
    # Which block of the batch's masked streams a token belongs to.
    blocks = torch.zeros(shape, dtype=torch.long)
    num_blocks = 0
    for row, members in enumerate(rows):
        first = 0
        for number, text in enumerate(members):
            middle, end = first + len(text.clean), first + len(text)
            targets[row, first:middle] = torch.tensor(text.clean, dtype=torch.long)
            positions[row, first:middle] = torch.arange(len(text.clean))
            for tensor, values in zip(
                (targets, positions, copies, weights),
                zip(*text.masked, strict=True),
                strict=True,
            ):
                tensor[row, middle:end] = torch.tensor(values)
            texts[row, first:end] = number
            own = torch.arange(len(text.masked)) // block_length
            blocks[row, middle:end] = num_blocks + own
            num_blocks += int(own[-1]) + 1
            first = end
    order = torch.randperm(num_blocks, generator=generator)
    draws = (order + torch.rand(num_blocks, generator=generator)) / num_blocks
    share = (LEAST_MASKED + (1 - LEAST_MASKED) * draws)[blocks]
    masked = (torch.rand(shape, generator=generator) < share) & (weights > 0)
    return Streams(
        inputs=targets.masked_fill(masked, tokenizer.MASK_ID),
        targets=targets,
        weights=weights * masked / (share * weights.sum()),
        positions=positions,
        texts=texts,
        copies=copies,
    )
