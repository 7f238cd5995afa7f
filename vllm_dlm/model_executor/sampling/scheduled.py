# SPDX-License-Identifier: Apache-2.0
"""Rows of strategies that set the temperature themselves (`Strategy.temperature`).

What a request restricts or truncates is taken out of a row's logits z first, at
temperature 1. Statistics and mixtures are those of softmax(z / T), whatever the request
says of its own temperature; a token is drawn at that times T, and is the best one at 0.
What is read of a text that must match a pattern is measured elsewhere
(`constrained_scheduled.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from vllm_dlm.kernels.draw import draw
from vllm_dlm.kernels.mixtures import mixtures
from vllm_dlm.kernels.token_stats import prob_of, token_stats
from vllm_dlm.model_executor.sampling.soft_memory import keep_mixtures
from vllm_dlm.strategies.base import given

if TYPE_CHECKING:
    from vllm_dlm.kernels.shards import VocabShard
    from vllm_dlm.model_executor.planning.block_rows import BlockRows
    from vllm_dlm.model_executor.sampling.candidates import Candidates
    from vllm_dlm.model_executor.sampling.choice import Choice, Tile
    from vllm_dlm.model_executor.sampling.logits import Head


class Scheduled(NamedTuple):
    """R blocks of a group whose strategy sets the temperature."""

    blocks: BlockRows
    masked: torch.Tensor
    """[R, B] bool: positions that may be written."""
    step: torch.Tensor
    """[R] int64: which noise is drawn with."""
    temperature: torch.Tensor
    """[R] float32, above 0."""
    memory: torch.Tensor | None
    """[seats + 1, B, H]: mixtures of the group; None where it makes none."""


def choose(
    tile: Tile,
    choice: Choice,
    scheduled: Scheduled,
    candidates: Candidates,
    head: Head,
    free: np.ndarray,
) -> None:
    """Draw and measure a tile's rows at the strategy's temperature.

    Args:
        choice: of the tile's rows: changed in place.
        free: [n] bool: rows that no pattern says anything of; others are left alone.
    """
    shapes = candidates.shapes(tile.slots_np)
    for some, is_whole in (
        ((free & ~shapes).nonzero()[0], False),
        ((free & shapes).nonzero()[0], True),
    ):
        if len(some):
            scores = _scores(tile, some, candidates, is_whole=is_whole)
            _choose(tile, choice, scheduled, candidates, head, some, scores, is_whole)


def _scores(
    tile: Tile, some: np.ndarray, candidates: Candidates, *, is_whole: bool
) -> torch.Tensor:
    """[m, V] float32: logits of rows [m] of a tile, of this rank or of all."""
    if is_whole:
        return candidates.shaped(tile, some)
    at = torch.from_numpy(some).to(tile.values.device, non_blocking=True)
    return tile.values[at].float()


def _choose(
    tile: Tile,
    choice: Choice,
    scheduled: Scheduled,
    candidates: Candidates,
    head: Head,
    some: np.ndarray,
    scores: torch.Tensor,
    is_whole: bool,
) -> None:
    rows, blocks = tile.blocks, tile.blocks.blocks
    device, shard = scores.device, None if is_whole else tile.logits.shard

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    at = on_device(some)
    own = at + tile.own.start
    owners = rows.row_request[own]
    scores = scores.div_(scheduled.temperature[owners][:, None])
    stats = token_stats(scores, need_entropy=True, need_margin=True, shard=shard)
    temperature = candidates.slots.temperature[blocks.slots[owners]]
    off = torch.zeros_like(temperature)
    drawn = draw(
        scores,
        argmax=stats.argmax,
        temperature=temperature,
        top_k=off.long(),
        top_p=off + 1,
        min_p=off,
        seed=blocks.requests.seed[owners],
        position=blocks.positions.flatten()[rows.row_places[own]],
        step=tile.step[owners],
        rows=on_device(candidates.draw(tile.slots_np[some]).nonzero()[0]),
        truncated_rows=on_device(np.zeros(0, dtype=np.int64)),
        shard=shard,
    )
    drawn = torch.where(tile.masked[at], drawn, stats.argmax)
    choice.candidate[at] = drawn
    choice.confidence[at] = prob_of(scores, drawn, stats.logsumexp, shard)
    # A row of which nothing is allowed is broken.
    stuck = (stats.logsumexp == -torch.inf) & tile.masked[at]
    choice.logsumexp[at] = choice.logsumexp[at].masked_fill(stuck, -torch.inf)
    choice.entropy[at] = given(stats.entropy, "entropy")
    choice.margin[at] = given(stats.margin, "margin")
    choice.best[at], choice.best_confidence[at] = stats.argmax, stats.confidence
    if scheduled.memory is not None:
        mixed = mixed_by(scores, stats.logsumexp, head, tile.logits.shard, shard)
        keep_mixtures(scheduled.memory, rows, own, mixed)


def mixed_by(
    scores: torch.Tensor,
    logsumexp: torch.Tensor,
    head: Head,
    of_rank: VocabShard | None,
    shard: VocabShard | None,
) -> torch.Tensor:
    """[m, H]: mixtures by rows of scores [m, V], of all ranks together.

    Args:
        logsumexp: [m], of whole rows.
        of_rank: the rank's part of the vocabulary; None where there is one rank.
        shard: which part of it the scores are; None for all of it.
    """
    if shard is not None or of_rank is None:
        return mixtures(scores, head, shard, logsumexp)
    # Whole rows, that every rank has.
    probabilities = scores.softmax(dim=1)
    return head.mixed(probabilities[:, of_rank.first : of_rank.first + of_rank.size])
