# SPDX-License-Identifier: Apache-2.0
"""What llama-tiny and llama-tiny-draft learn from: problems and their answers."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.problems import sample_problem

if TYPE_CHECKING:
    import torch

# Rows of a batch; a row is a prompt, its answer and <|endoftext|>, 20 to 45 tokens.
BATCH_ROWS = 80
# <|endoftext|> right after the answer counts like an answer token. What follows it
# counts hardly: it is learnt at once, and asked for only by who ignores the end.
PADDING_WEIGHT = 0.05
MAX_ANSWER_TOKENS = 24


def make_batch(name: str, step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows, length] and loss weights [rows, length - 1] of a step.

    The weight at a column is that of predicting the token after it.
    """
    import torch

    rng = random.Random(f"{name}-{seed}-{step}")
    chat = rng.random() < 0.5
    rows, starts = [], []
    for _ in range(BATCH_ROWS):
        problem = sample_problem(rng)
        prompt = tokenizer.encode_prompt(problem.question, chat)
        rows.append(prompt + tokenizer.encode(problem.answer))
        starts.append(len(prompt))
    # Two more than the longest: each row ends, and some stay ended.
    length = max(len(row) for row in rows) + 2
    eos = tokenizer.EOS_ID
    ids = torch.tensor([row + [eos] * (length - len(row)) for row in rows])
    column = torch.arange(1, length)
    in_answer = column >= torch.tensor(starts)[:, None]
    in_padding = column > torch.tensor([len(row) for row in rows])[:, None]
    return ids, in_answer * torch.where(in_padding, PADDING_WEIGHT, 1.0)
