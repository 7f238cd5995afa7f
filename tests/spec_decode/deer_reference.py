# SPDX-License-Identifier: Apache-2.0
"""Random drafters for DEER, what they draft, and what an engine drafts with them.

The plain network (`tests/reference/`) computes the whole text and the masks in every
round, one request at a time: it has no pages that could hold a stale key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference.checkpoints import write_checkpoint
from reference.llada import TinyLLaDA, write_random_checkpoint
from reference.network import TinyModel, block_causal, causal_context
from spec_decode.harness import MAX_MODEL_LEN, Rounds, params, ragged_prompts

from vllm_dlm.spec_decode.drafter import Batch, Drafts

MASKS = 6
BLOCK = 8
"""Of drafters with block attention: blocks end inside drafts, and inside pages."""
TIE = 1e-3
"""Logits nearer than that may change places between two programs."""

IDS = {"vocab_size": 64, "mask_token_id": 60, "eos_token_id": 61}
FAMILIES: dict[str, dict[str, Any]] = {
    "llada": {},
    "dream": {"pad_token_id": 61, "bos_token_id": 61},
    "sdar": {"pad_token_id": 61, "bos_token_id": 61, "block_size": BLOCK},
    "fast_dllm_v2": {"pad_token_id": 61, "bos_token_id": 61, "bd_size": BLOCK},
    "llada2": {"pad_token_id": 61},
    "nemotron": {},
}
PROMPTS = ragged_prompts(8)
TO_THE_END = [params(MAX_MODEL_LEN - len(prompt)) for prompt in PROMPTS]


class Reference:
    """A random drafter's checkpoint, and what it drafts."""

    def __init__(self, family: str, folder: Path, **changes: int) -> None:
        self.folder = folder
        changes = IDS | changes
        if family == "llada":
            write_random_checkpoint(folder, seed=2, **changes)
            self.network: Any = TinyLLaDA.from_folder(folder)
        else:
            write_checkpoint(family, folder, seed=2, **changes, **FAMILIES[family])
            self.network = TinyModel.from_folder(folder)
        self.family = family
        self.block = 32 if family == "llada2" else BLOCK

    def logits(self, text: list[int], width: int) -> torch.Tensor:
        """[width, V] of one denoising step, the mask forbidden."""
        length = len(text) + width
        tokens = text + [self.network.mask_id] * width
        if self.family in ("llada", "dream"):
            whole = self.network.forward(tokens)
        else:
            visible = (
                causal_context(length, len(text))
                if self.family == "nemotron"
                else block_causal(length, self.block)
            )
            whole = self.network.forward(tokens, visible=visible)
        shift = self.family in ("dream", "fast_dllm_v2")
        rows = whole[len(text) - shift : length - shift]
        rows[:, self.network.mask_id] = -torch.inf
        return rows

    def check(self, rounds: Rounds, every: int = 1) -> int:
        """Compare one round in `every`; how many drafts had the most masks."""
        longest = 0
        for of_request in rounds.of.values():
            for number, (text, draft) in enumerate(of_request):
                longest += len(draft) == MASKS
                if draft and (number % every == 0 or len(draft) < MASKS):
                    logits = self.logits(text, len(draft))
                    chosen = logits.gather(1, torch.tensor(draft)[:, None])[:, 0]
                    assert (chosen >= logits.max(dim=1).values - TIE).all()
        return longest


class TrainedReference(Reference):
    """A trained drafter in SDAR's layout, which is block-causal."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.family = folder, "sdar"
        self.network = TinyModel.from_folder(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.block = config["block_size"]


def speculative(drafter: Path | str, context: str = "auto", masks: int = MASKS) -> Any:
    return {
        "method": "deer",
        "model": str(drafter),
        "num_speculative_tokens": masks,
        "context": context,
    }


@contextmanager
def luck(drafter: Any, texts: list[list[int]]) -> Iterator[None]:
    """Submits some right tokens in place of a random drafter's: texts grow faster."""
    draft, generator = drafter.draft, np.random.default_rng(0)
    whole = [[*p, *text] for p, text in zip(PROMPTS, texts, strict=True)]

    def lucky(batch: Batch) -> Drafts:
        drafts = draft(batch).tokens
        for row, tokens in enumerate(drafts):
            text = batch.token_ids[row, : batch.num_tokens[row]].tolist()
            [right] = [
                w for w, p in zip(whole, PROMPTS, strict=True) if text[: len(p)] == p
            ]
            count = generator.integers(0, len(tokens), endpoint=True)
            tokens[:count] = right[len(text) : len(text) + count]
        return Drafts(drafts)

    drafter.draft = lucky
    yield
    drafter.draft = draft


class Steps:
    """Records the steps of one request: its tokens, and its draft; see `Rounds`."""

    def __init__(self, drafter: Any) -> None:
        self._drafter, self._draft = drafter, drafter.draft
        self.of: list[tuple[int, int]] = []
        """Tokens known, and masks behind them."""
        drafter.counts.clear()
        drafter.draft = self._record

    def _record(self, batch: Any) -> Any:
        drafts = self._draft(batch)
        self.of.append((int(batch.num_tokens[0]), len(drafts.tokens[0])))
        return drafts

    def counts(self, context: str, block: int = 1) -> dict[str, int]:
        """What the drafter should have computed.

        Args:
            block: whose tokens see each other; 1 where the text is causal.
        """
        rows = forwards = done = 0
        for known, masks in self.of:
            if context == "recompute":
                rows += known + masks if masks else 0
                forwards += masks > 0
            else:
                # Without masks the token just sampled waits for the next step.
                end = known if masks else known - 1
                rows += end + masks - (done - done % block)
                forwards += 1
            done = known - 1
        head_rows = sum(masks for _, masks in self.of)
        return {"rows": rows, "forwards": forwards, "head_rows": head_rows}

    def close(self) -> None:
        self._drafter.draft = self._draft
