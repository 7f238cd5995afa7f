# SPDX-License-Identifier: Apache-2.0
"""Constrained texts of strategies that set the temperature (`Strategy.temperature`).

Such a strategy reads softmax(logits / T) of each position, and is fed the mean of all
embeddings under it (`sampling/scheduled.py`). Of a text that must match a pattern it
reads, and is fed, the posterior given that the text matches: so no mixture holds what
the pattern forbids.

Mixtures take whole rows of logits once the paths are found. These are computed again,
unless all of the step's rows are one tile; a tile of them exists at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_dlm.constraints.paths import BEST
from vllm_dlm.kernels.class_stats import class_draws, class_stats
from vllm_dlm.kernels.token_stats import row_slices
from vllm_dlm.model_executor.constrained_rows import (
    add_bias,
    drawing_of,
    noise_of,
    shares,
    truncated,
)
from vllm_dlm.model_executor.planning.block_rows import upload
from vllm_dlm.model_executor.sampling.scheduled import mixed_by
from vllm_dlm.model_executor.sampling.soft_memory import keep_mixtures

if TYPE_CHECKING:
    from vllm_dlm.kernels.shards import VocabShard
    from vllm_dlm.model_executor.constrained_text import Step
    from vllm_dlm.model_executor.sampling.logits import Head, Logits


def measure_scheduled(
    step: Step, own: slice, values: torch.Tensor, logits: Logits
) -> dict[str, torch.Tensor]:
    """As `constrained_rows.measure`, all of it at the strategy's temperature.

    Args:
        own: which rows of `logits` they are.
        values: [n, V]: this rank's part.
    """
    text, device = step.text, logits.device
    rows = np.arange(own.start, own.stop)
    own_scores = values.to(torch.float32, copy=True)
    scores, shard = _scores(step, rows, own_scores, logits)
    classes = text.pattern.classes(device, shard)
    parts = class_stats(scores, classes, shard=shard)
    if not text.draws:
        return {"parts": parts}
    temperature = text.request.params.temperature
    top = parts[..., BEST].amax(dim=1).float()
    top = torch.where(top.isfinite(), top, 0.0)
    heat = torch.full_like(top, temperature)
    noise = noise_of(step, rows, device)
    drawn = class_draws(scores, classes, top, heat, *noise, shard)
    weights = None
    if temperature != 1:
        weights = class_stats(scores, classes, 1 / temperature, shard)
    return {"parts": parts, **drawing_of(weights, *drawn)}


def _scores(
    step: Step, rows: np.ndarray, values: torch.Tensor, logits: Logits
) -> tuple[torch.Tensor, VocabShard | None]:
    """Logits as the request biases and truncates them, over the strategy's temperature.

    Args:
        rows: [n], of `logits`, ascending.
        values: [n, V] float32: this rank's part of them; may be changed.

    Returns:
        [n, V] float32, and which part of the vocabulary they are; None for all of it.
    """
    assert step.scheduled is not None
    text, heat = step.text, step.scheduled.temperature[step.number]
    if not text.truncates:
        add_bias(text, values, logits.shard)
        return values.div_(heat), logits.shard
    (at,) = upload(logits.device, rows)
    values = logits.whole(values, at)
    add_bias(text, values, None)
    classes = text.pattern.classes(logits.device)
    return truncated(step, rows, values, classes, 1.0, heat), None


def keep_means(step: Step, logits: Logits, head: Head) -> None:
    """Keep the mixtures that a request's positions are fed: those of the posterior.

    Args:
        step: of which the path is found.
        logits: of the step's rows.
    """
    scheduled, rows, device = step.scheduled, step.rows_read, logits.device
    if scheduled is None or scheduled.memory is None or step.solved is None:
        return
    at, bits = upload(device, rows, shares(step).view(np.int64))
    share = bits.view(torch.float64).float()
    for part, values in logits.parts(at):
        scores, shard = _scores(step, rows[part], values.float(), logits)
        class_of = step.text.pattern.classes(device).class_of
        if shard is not None:
            scores = shard.columns(scores)
            class_of = class_of[shard.first : shard.first + shard.size]
        own = share[part]
        for some in row_slices(scores):
            # Logs of the posterior.
            scores[some] += own[some][:, class_of]
        mixed = mixed_by(scores, torch.zeros_like(own[:, 0]), head, logits.shard, shard)
        own_rows = at[part] - scheduled.blocks.first_row
        keep_mixtures(scheduled.memory, scheduled.blocks, own_rows, mixed)
