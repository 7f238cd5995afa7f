# SPDX-License-Identifier: Apache-2.0
"""SVDecode in plain torch and transformers, one text at a time, no cache.

Written from arXiv 2509.15888, without the package: the direction is the gradient of
the divergence itself, taken by autograd in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaForCausalLM

from vllm_dlm.config.aliases import local_folder

TUNED, BASE = "llama-tiny", "llama-tiny-draft"
EOS = 0


def load(name: str) -> Any:
    """A built-in network, in float32."""
    return LlamaForCausalLM.from_pretrained(local_folder(name), dtype=torch.float32)


def steered_logits(
    tuned: torch.Tensor, base: torch.Tensor, mu: float, keep: float
) -> torch.Tensor:
    """Of one position: logits [V] of the steered distribution, in float64."""
    z = tuned.double().requires_grad_()
    log_p, log_q = z.log_softmax(-1), base.double().log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum()
    (gradient,) = torch.autograd.grad(divergence, z)
    steered = z.detach() - mu * gradient
    p = log_p.detach().exp()
    return steered.masked_fill(p < keep * p.max(), -math.inf)


class Pair:
    """Both networks."""

    def __init__(self) -> None:
        self.networks = [load(TUNED), load(BASE)]

    def logits(self, text: list[int], mu: float, keep: float) -> torch.Tensor:
        """What follows a text, [V]."""
        with torch.no_grad():
            both = [
                each(torch.tensor([text])).logits[0, -1].float()
                for each in self.networks
            ]
        return steered_logits(*both, mu, keep)

    def write(
        self, prompt: list[int], max_tokens: int, mu: float, keep: float
    ) -> Written:
        """Greedy decoding."""
        token_ids: list[int] = []
        closest = math.inf
        while len(token_ids) < max_tokens:
            logits = self.logits(prompt + token_ids, mu, keep)
            best = logits.topk(2).values
            closest = min(closest, float(best[0] - best[1]))
            token_ids.append(int(logits.argmax()))
            if token_ids[-1] == EOS:
                break
        return Written(token_ids, closest)


@dataclass
class Written:
    """What the reference wrote."""

    token_ids: list[int]
    closest: float
    """Smallest distance of the two best logits, over all steps."""
