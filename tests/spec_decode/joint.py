# SPDX-License-Identifier: Apache-2.0
"""Whether sampled texts have the target's distribution: chi-square over whole texts.

All texts of a few tokens over a small vocabulary are counted, and compared with their
exact probabilities. Token by token would miss errors that cancel in the margins.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from spec_decode.harness import Engine, params
from transformers import AutoModelForCausalLM

VOCAB = 6
LENGTH = 3
SAMPLES = 6000
FEW = 2000
"""Where a method's own rule is at stake, and not whether the test can fail."""
PROMPT = [3, 1, 4, 1, 5]

PASSES = 1e-3
FAILS = 1e-9
"""P-values; between them lies nothing that a test should meet."""


def probabilities(
    model: Path,
    prompt: Sequence[int],
    temperature: float,
    forbidden: Sequence[int] = (),
) -> Any:
    """[VOCAB ** LENGTH] float64: of each text, exactly; 0 with a forbidden token."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    texts = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
    rows = torch.cat((torch.tensor([prompt] * len(texts)), texts), dim=1)
    with torch.no_grad():
        logits = network(rows).logits[:, len(prompt) - 1 : -1] / temperature
    logits[..., list(forbidden)] = -torch.inf
    chosen = logits.log_softmax(-1).gather(2, texts[..., None])[..., 0]
    return chosen.sum(1).exp()


def counts(engine: Engine, prompt: Sequence[int], samples: int, **options: Any) -> Any:
    """[VOCAB ** LENGTH] int64: how often each text came, without seeds."""
    options = {"temperature": 1.0} | options
    texts = engine.run([prompt] * samples, params(LENGTH, **options))
    powers = torch.tensor([VOCAB**i for i in reversed(range(LENGTH))])
    return torch.bincount(
        (torch.tensor(texts) * powers).sum(1), minlength=VOCAB**LENGTH
    )


def p_value(observed: Any, probability: Any) -> float:
    """Of Pearson's chi-square, cells that expect less than 5 put together."""
    expected = probability * observed.sum()
    small = expected < 5
    if small.any():
        pooled = torch.stack((observed[small].sum().double(), expected[small].sum()))
        observed = torch.cat((observed[~small].double(), pooled[:1]))
        expected = torch.cat((expected[~small], pooled[1:]))
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic.double() / 2))
