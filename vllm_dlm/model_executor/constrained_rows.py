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
    from vllm_dlm.kernels.shards import VocabShard
    from vllm_dlm.model_executor.constrained_text import Step, Text
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

    "parts" first, as of a `Problem`; then what a `Drawing` has, by its names.

    Args:
        own: which rows of `logits` they are.
        values: [n, V]: this rank's part.
        choice: of these rows, each with its argmax.
    """
    text, shard = step.text, logits.shard
    params, request = text.request.params, text.request
    rows = np.arange(own.start, own.stop)
    if text.truncates:
        (at,) = upload(logits.device, rows)
        values = logits.whole(values.clone(), at)
        shard = None
    classes = text.pattern.classes(logits.device, shard)
    if text.bias is not None:
        values = values.to(torch.float32, copy=True)
        add_bias(text, values, shard)
    found = {"parts": class_stats(values, classes, shard=shard)}
    if not text.draws:
        return found
    temperature, noise = params.temperature, noise_of(step, rows, logits.device)
    if text.truncates:
        scores = truncated(step, rows, values, classes, temperature)
        ones = torch.ones(len(values), device=logits.device)
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
    return found | drawing_of(weights, drawn, tokens, raw)


def drawing_of(
    weights: torch.Tensor | None,
    scores: torch.Tensor,
    tokens: torch.Tensor,
    raw: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """What a `Drawing` has, by name: [n, K] float64 each.

    Args:
        weights: [n, K, 5], numbers of the classes as they are drawn from; None where
            these are those that are measured.
        scores, tokens: [n, K], of `class_draws`.
        raw: [n, K]: those tokens' logits, as the statistics measure them.
    """
    found = {"scores": scores, "tokens": tokens.double(), "logits": raw}
    if weights is not None:
        found["weights"] = weights[..., BEST] + weights[..., TOTAL].log()
    return found


def noise_of(
    step: Step, rows: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Seed, position and step, [n] int64 each, by which rows are drawn.

    Args:
        rows: [n], of logits; those that are not the request's have its first position.
    """
    request = step.text.request
    offset = {int(row): i for i, row in enumerate(step.row_at) if row >= 0}
    first = step.begin + request.layout.prompt_len
    (positions,) = upload(
        device, first + np.array([offset.get(row, 0) for row in rows.tolist()])
    )
    return (
        torch.full_like(positions, request.seed),
        positions,
        torch.full_like(positions, step.noise),
    )


def add_bias(text: Text, values: torch.Tensor, shard: VocabShard | None) -> None:
    """Apply a request's `logit_bias` to logits [n, V], in place.

    Args:
        shard: which part of the vocabulary the columns are; None for all of it.
    """
    if text.bias is None or not values.shape[1]:
        return
    ids, bias = text.bias
    first, size = (0, values.shape[1]) if shard is None else (shard.first, shard.size)
    is_here = ((ids >= first) & (ids < first + size)).to(values.dtype)
    columns = (ids - first).clamp(0, values.shape[1] - 1)
    values.index_add_(1, columns, (bias * is_here).expand(len(values), -1))


def truncated(
    step: Step,
    rows: np.ndarray,
    values: torch.Tensor,
    classes: TokenClasses,
    temperature: float,
    further: torch.Tensor | None = None,
) -> torch.Tensor:
    """[n, V] float32: logits / temperature; cut tokens far below, others -inf.

    Top-k, top-p and min-p choose among the tokens of feasible classes.

    Args:
        rows: [n], of logits, ascending: those of `values`.
        temperature: at which they choose.
        further: one number, by which what they leave is divided; None for 1.
    """
    params = step.text.request.params
    allowed_np = np.zeros((len(rows), step.text.pattern.num_classes + 1), dtype=bool)
    ours = np.isin(step.row_at, rows)
    places = np.searchsorted(rows, step.row_at[ours])
    allowed_np[places] = step.feasible()[ours]
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
        column(temperature),
        column(min(max(params.top_k, 0), values.shape[1]), torch.int64),
        column(params.top_p),
        column(params.min_p),
    )
    cut = (scores - top) / temperature
    if further is not None:
        kept, cut = kept / further, cut / further
    return torch.where(kept > -torch.inf, kept, cut + CUT)


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
                own, bits = upload(device, step.rows_read, shares(step).view(np.int64))
                at = torch.searchsorted(own, wanted).clamp(max=len(own) - 1)
                is_own = (own[at] == wanted)[:, None]
                class_of = step.text.pattern.classes(device).class_of
                share = bits.view(torch.float64)[at][:, class_of]
                raw = logits
                if step.text.bias is not None:
                    raw = logits.clone()
                    add_bias(step.text, raw, None)
                logits = torch.where(is_own, raw + share, logits)
            yield part, logits


def shares(step: Step) -> np.ndarray:
    """[read rows, K + 1] float64: what logits lack to be logs of the posterior.

    By the token's class; -inf for what no path takes.
    """
    assert step.solved is not None
    problem, solution = step.solved
    parts, posterior = problem.parts[step.read], solution.classes[step.read]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log(posterior) - parts[..., BEST] - np.log(parts[..., TOTAL])
    found[posterior <= 0] = -np.inf
    return np.pad(found, ((0, 0), (0, 1)), constant_values=-np.inf)
