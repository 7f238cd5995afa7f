# SPDX-License-Identifier: Apache-2.0
"""How much a drafter has learnt: its loss beside that of an untrained one."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vllm_dlm.tasks import tokenizer
from vllm_dlm.training.drafters.deer_data import Recipe, make_batch
from vllm_dlm.training.drafters.networks import load_drafter, make_drafter
from vllm_dlm.training.drafters.teacher import Answered


def losses(folder: Path, attention_block: int | None = None) -> tuple[float, float]:
    """Of a fresh drafter and of a folder's, on the folder's answers."""
    kept = json.loads((folder / "answers.json").read_text())
    torch.manual_seed(1)
    recipe = Recipe(
        mask_id=tokenizer.MASK_ID, end_id=tokenizer.EOS_ID, stage_one_steps=0
    )
    answered = Answered(kept["prompts"], kept["answers"])
    ids, inputs, valid, weights = make_batch(answered, 99, 3, recipe)
    found = []
    for drafter in (make_drafter("llama-tiny", attention_block), load_drafter(folder)):
        with torch.no_grad():
            logits = drafter.network(inputs, valid)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids.flatten(), reduction="none"
        )
        found.append(float((loss * weights.flatten()).sum() / weights.sum()))
    before, after = found
    return before, after
