# SPDX-License-Identifier: Apache-2.0
"""DEL in plain PyTorch, which its drafter on an engine is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from vllm_dlm.spec_decode.del_exit.exits import ExitStatistics


class Oracle:
    """DEL for one greedy request: every prefix computed anew by transformers."""

    def __init__(
        self, folder: Path, exits: list[int], num_layers: int, stop: str
    ) -> None:
        self.network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.exits = exits
        self.num_layers = num_layers
        self.stop = stop

    def logits(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """[E, n, V] of the exits and [n, V] of the whole model."""
        with torch.no_grad():
            out = self.network(torch.tensor([tokens]), output_hidden_states=True)
            early = [
                self.network.lm_head(self.network.model.norm(out.hidden_states[exit]))
                for exit in self.exits
            ]
        return torch.stack(early)[:, 0], out.logits[0]

    def observe(self, tokens: list[int], first: int, **options: Any) -> None:
        """Count the positions from `first` on: the target's prediction of the next."""
        early, full = (logits[..., first:, :] for logits in self.logits(tokens))
        hits = early.argmax(-1) == full.argmax(-1)
        sure = early.softmax(-1).amax(-1)
        self.statistics.update(hits.T.numpy(), sure.T.numpy(), **options)

    def rounds(self, prompt: list[int], max_tokens: int, most: int = 18) -> list[Any]:
        self.statistics = ExitStatistics(self.exits)
        self.observe(prompt, max(0, len(prompt) - 32), new_round=False)
        tokens = [*prompt, int(self.logits(prompt)[1][-1].argmax())]
        rounds = []
        while (left := len(prompt) + max_tokens - len(tokens)) > 0:
            if left > 1:
                choice = self.statistics.choose(self.num_layers, min(most, left - 1))
                draft = self.draft(tokens, choice)
                rounds.append((len(tokens), choice.exit, choice.length, tuple(draft)))
            else:
                draft = []
            right = self.logits(tokens + draft)[1].argmax(-1)[len(tokens) - 1 :]
            accepted = 0
            while accepted < len(draft) and draft[accepted] == right[accepted]:
                accepted += 1
            first = len(tokens) - 1
            tokens += right[: accepted + 1].tolist()
            self.observe(tokens[:-1], first)
        return rounds

    def draft(self, tokens: list[int], choice: Any) -> list[int]:
        draft: list[int] = []
        product = 1.0
        while choice.length and len(draft) < choice.most:
            early, _ = self.logits(tokens + draft)
            last = early[self.exits.index(choice.exit), -1].softmax(-1)
            draft.append(int(last.argmax()))
            product *= float(last.max())
            unsure = bool(last.max() < choice.threshold)
            full = len(draft) == choice.length
            if {
                "both": unsure or full,
                "confidence": unsure,
                "length": full,
                "gain": product < choice.least_product,
            }[self.stop]:
                break
        return draft
