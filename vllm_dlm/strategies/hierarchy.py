# SPDX-License-Identifier: Apache-2.0
"""Hierarchical decoding: divide the block at what is known, write in each part.

The masked positions of a block form runs, parted by decided tokens. Of every run the
most confident position is written if c_i > low_threshold, where c_i is the probability
of the token at i; so is every masked i with c_i > threshold. Where no c_i reaches
low_threshold, or nothing qualifies, the most confident position of all is written
alone. A token that is written parts its run, so the next step writes on either side.

With `remask`, decided positions at which the model now gives no token a probability of
low_threshold are masked again, and at least one token more is written than is taken
back. Where there are too few masks for that, only the least sure are taken back: every
step gains a token. (dInfer takes back all.) Source: dInfer, arXiv 2510.08666, and its
code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from vllm_dlm.strategies.base import (
    Context,
    Decision,
    Params,
    Strategy,
    View,
    best_masked,
    top_of,
)
from vllm_dlm.strategies.presets import Preset


class HierarchyParams(Params):
    """Parameters of `Hierarchy`."""

    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            {"threshold": 0.8, "low_threshold": 0.5},
            "inclusionAI/dInfer, evaluations/eval_guide.md",
            "block_length 64, cache dual",
        ),
        "careful": Preset(
            {"threshold": 0.9, "low_threshold": 0.7},
            "inclusionAI/dInfer, benchmarks/benchmark_dataset.py, setting 14",
            "cache dual",
        ),
    }

    threshold: float = Field(
        default=0.8,
        gt=0.0,
        le=2.0,
        description=(
            "A token with a probability above this is written wherever it is. From 1 "
            "on, a step writes at most one token of each run of masks."
        ),
    )
    low_threshold: float = Field(
        default=0.5,
        ge=0.0,
        le=2.0,
        description=(
            "The best token of a run of masks is written if its probability is above "
            "this. Lower is faster and less exact; equal to `threshold`, runs add "
            "nothing; above 1, each step writes one token."
        ),
    )
    remask: bool = Field(
        default=False,
        description=(
            "Mask a token again when the model's best one for its place has fallen "
            "below `low_threshold`. More forwards, and text is streamed by the block."
        ),
    )


class Hierarchy(Strategy):
    """Write the best position of each run of masks, and all that are sure."""

    name = "hierarchy"
    paper = "arXiv 2510.08666 (dInfer)"
    summary = "the best token of each run of masks, and every sure one"
    Params = HierarchyParams
    logit_rows = "block"

    params: HierarchyParams

    def __init__(
        self, params: HierarchyParams, block_length: int, context: Context
    ) -> None:
        super().__init__(params, block_length, context)
        self.may_rewrite = params.remask

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        low = row_params["low_threshold"][:, None]
        sure = view.confidence > row_params["threshold"][:, None]
        fair = view.confidence > low
        commit = (sure & view.masked) | (fair & best_of_runs(view))
        reached = (view.masked & (view.confidence >= low)).any(dim=1, keepdim=True)
        commit = (commit & reached) | best_masked(view)
        if not self.params.remask:
            return Decision(commit)
        doubtful = view.decided & (view.confidence < low)
        masks = view.masked.sum(dim=1)
        taken_back = doubtful.sum(dim=1).clamp(max=(masks - 1).clamp(min=0))
        remask = top_of(doubtful, -view.confidence, taken_back)
        # What is written makes up for what is taken back, and for one more.
        missing = taken_back + 1 - commit.sum(dim=1)
        commit |= top_of(view.masked & ~commit, view.confidence, missing)
        return Decision(commit, remask=remask)


def best_of_runs(view: View) -> torch.Tensor:
    """[R, B] bool: the most confident position of each run (lowest on ties)."""
    masked = view.masked
    begins = masked.clone()
    begins[:, 1:] &= ~masked[:, :-1]
    # A run's number in its row. Decided positions take that of the run to their left,
    # where they never win.
    run = (begins.cumsum(dim=1) - 1).clamp(min=0)
    score = torch.where(masked, view.confidence, -torch.inf)
    is_best = masked & (score == best_per_run(score, run).gather(1, run))
    place = torch.arange(masked.shape[1], device=masked.device).float()
    earliness = torch.where(is_best, -place, -torch.inf)
    return is_best & (earliness == best_per_run(earliness, run).gather(1, run))


def best_per_run(score: torch.Tensor, run: torch.Tensor) -> torch.Tensor:
    """[R, B]: the highest score of each run, filed under the run's number.

    Args:
        score: [R, B] float32.
        run: [R, B] int64: the number of each position's run, from 0.
    """
    lowest = torch.full_like(score, -torch.inf)
    return lowest.scatter_reduce(1, run, score, "amax")
