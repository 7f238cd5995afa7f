# SPDX-License-Identifier: Apache-2.0
"""Rows of constrained texts: what is measured of their logits, and their posterior."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_dlm.constraints.paths import BEST, TOTAL
from vllm_dlm.kernels.class_stats import TokenClasses, class_draws, class_stats
from vllm_dlm.kernels.draw import tempered
from vllm_dlm.kernels.shards import logit_of
from vllm_dlm.model_executor.planning.block_rows import upload

if TYPE_CHECKING:
    from vllm_dlm.model_executor.constrained_text import Step
    from vllm_dlm.model_executor.sampling.choice import Choice
    from vllm_dlm.model_executor.sampling.logits import Logits

CUT = -1e4
"""Added to the score of a token that top-k, top-p or min-p cut: it is drawn only where
no path does without."""


def measure(
    step: Step,
    own: slice,
    values: torch.Tensor,
    logits: Logits,
    choice: Choice,
) -> dict[str, torch.Tensor]:
    """What paths need of some rows of a request: [n, ...] each, float64.

    Args:
        own: which rows of `logits` they are.
        values: [n, V]: this rank's part.
        choice: of these rows, each with its argmax.
    """
    text, shard = step.text, logits.shard
    params, request = text.request.params, text.request
    if text.truncates:
        at = torch.arange(own.start, own.stop, device=logits.device)
        values = logits.whole(values.clone(), at)
        shard = None
    classes = text.pattern.classes(logits.device, shard)
    if text.bias is not None:
        ids, bias = text.bias
        values = values.to(torch.float32, copy=True)
        first, size = (
            (0, values.shape[1]) if shard is None else (shard.first, shard.size)
        )
        is_here = ((ids >= first) & (ids < first + size)).float()
        columns = (ids - first).clamp(0, max(values.shape[1] - 1, 0))
        if values.shape[1]:
            values.index_add_(1, columns, (bias * is_here).expand(len(values), -1))
    found = {"parts": class_stats(values, classes, shard=shard)}
    if not text.draws:
        return found
    temperature = params.temperature
    count = len(values)
    offset = {int(row): i for i, row in enumerate(step.row_at) if row >= 0}
    (positions,) = upload(
        logits.device,
        step.begin
        + request.layout.prompt_len
        + np.array([offset.get(r, 0) for r in range(own.start, own.stop)]),
    )
    noise = (
        torch.full_like(positions, request.seed),
        positions,
        torch.full_like(positions, step.noise),
    )
    if text.truncates:
        scores = _truncated(step, own, values, classes)
        ones = torch.ones(count, device=logits.device)
        weights = class_stats(scores, classes)
        drawn, tokens, logit = class_draws(
            scores, classes, torch.zeros_like(ones), ones, *noise
        )
        raw = values.gather(1, tokens).double()
    else:
        top = logit_of(values, choice.candidate, shard).float()
        top = torch.where(top.isfinite(), top, 0.0)
        weights = class_stats(values, classes, 1 / temperature, shard)
        drawn, tokens, raw = class_draws(
            values, classes, top, torch.full_like(top, temperature), *noise, shard
        )
        logit = raw / temperature
    if request.measures_drawn:
        found["parts"], raw = weights, logit
    return found | {
        "weights": weights[..., BEST] + weights[..., TOTAL].log(),
        "scores": drawn,
        "tokens": tokens.double(),
        "logits": raw,
    }


def _truncated(
    step: Step, own: slice, values: torch.Tensor, classes: TokenClasses
) -> torch.Tensor:
    """[n, V] float32: logits / temperature; cut tokens far below, others -inf.

    Top-k, top-p and min-p choose among the tokens of feasible classes.
    """
    params = step.text.request.params
    allowed_np = np.zeros(
        (own.stop - own.start, step.text.pattern.num_classes + 1), dtype=bool
    )
    ours = (step.row_at >= own.start) & (step.row_at < own.stop)
    allowed_np[step.row_at[ours] - own.start] = step.feasible()[ours]
    (allowed,) = upload(values.device, allowed_np)
    count, device = len(values), values.device
    taken = allowed.gather(1, classes.class_of.expand(count, -1)) != 0
    scores = values.float().masked_fill(values.isnan(), -torch.inf)
    scores = scores.masked_fill(~taken, -torch.inf)

    def column(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((count,), value, dtype=dtype, device=device)

    top = scores.amax(dim=1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    kept = tempered(
        scores,
        column(params.temperature),
        column(min(max(params.top_k, 0), values.shape[1]), torch.int64),
        column(params.top_p),
        column(params.min_p),
    )
    cut = (scores - top) / params.temperature + CUT
    return torch.where(kept > -torch.inf, kept, cut)


class Posterior:
    """Logits of a step's rows; of requests with a pattern, logs of the posterior.

    Args:
        logits: the model's.
        steps: of these requests.
    """

    def __init__(self, logits: Logits, steps: list[Step]) -> None:
        self._logits = logits
        self._steps = steps

    def over(self, rows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """As `Logits.over`."""
        device = rows.device
        for part, logits in self._logits.over(rows):
            wanted = rows[part]
            logits = logits.double()
            for step in self._steps:
                own, bits = upload(device, step.rows_read, _shares(step).view(np.int64))
                at = torch.searchsorted(own, wanted).clamp(max=len(own) - 1)
                is_own = (own[at] == wanted)[:, None]
                class_of = step.text.pattern.classes(device).class_of
                shares = bits.view(torch.float64)[at][:, class_of]
                raw = logits
                if step.text.bias is not None:
                    ids, bias = step.text.bias
                    raw = raw.index_add(
                        1, ids, bias.double().expand(len(raw), -1).contiguous()
                    )
                logits = torch.where(is_own, raw + shares, logits)
            yield part, logits


def _shares(step: Step) -> np.ndarray:
    """[read rows, K + 1] float64: what logits lack to be logs of the posterior.

    By the token's class; -inf for what no path takes.
    """
    assert step.solved is not None
    parts, posterior = (numbers[step.read] for numbers in step.solved)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.log(posterior) - parts[..., BEST] - np.log(parts[..., TOTAL])
    shares[posterior <= 0] = -np.inf
    return np.pad(shares, ((0, 0), (0, 1)), constant_values=-np.inf)
