# SPDX-License-Identifier: Apache-2.0
"""Dream's decoding: a share of the masks in each step, given by a falling time.

Time falls linearly from 1 to `eps` over the block's S steps; the step from t to s
writes int(m (1 - s / t)) of the m masks that are left, the last step all of them.
Because time ends above 0, the first share may round to nothing: with S = m the steps
write 0, 1, 1, ..., 1, 2. Which tokens are written is a score's choice, or chance
(`alg`). Source: Dream, arXiv 2508.15487, and Dream-org/Dream-v0-Instruct-7B's code.

Scores are those of the untempered distribution; Dream takes them after temperature and
top-p, as `diffucoder` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field

from vllm_dlm.strategies.base import (
    Context,
    Decision,
    Params,
    Strategy,
    View,
    given,
    top_masked,
)

_NEEDS = {"topk_margin": "margin", "entropy": "entropy"}


class DreamParams(Params):
    """Parameters of `Dream`; the number of steps is the request's, not the rule's."""

    alg: Literal["origin", "maskgit_plus", "topk_margin", "entropy"] = Field(
        default="entropy",
        description=(
            "What is written first: the most probable tokens (maskgit_plus), those "
            "with the largest lead over the runner-up (topk_margin), those with the "
            "least entropy; or every token by chance, whatever its score (origin)."
        ),
    )
    alg_temp: float = Field(
        default=0.0,
        ge=0.0,
        le=1e6,
        description=(
            "Temperature of the choice of positions: 0 takes the best, more draws them "
            "with probability softmax(score / alg_temp). Without effect on origin."
        ),
    )
    eps: float = Field(
        default=1e-3,
        gt=0.0,
        lt=1.0,
        description=(
            "Time at which the last step ends. Higher moves tokens to the last step."
        ),
    )


class Dream(Strategy):
    """Write the share of the masks that Dream's schedule has for the step."""

    name = "dream"
    paper = "arXiv 2508.15487 (Dream)"
    summary = "Dream's schedule, the least uncertain tokens first"
    Params = DreamParams
    needs = frozenset({"uniform", *_NEEDS.values()})
    schedule = True

    params: DreamParams

    def __init__(
        self, params: DreamParams, block_length: int, context: Context
    ) -> None:
        super().__init__(params, block_length, context)
        # Chance may be needed by a row of any algorithm: alg_temp is the row's own.
        needs = {"uniform"}
        if params.alg in _NEEDS:
            needs.add(_NEEDS[params.alg])
        self.needs = frozenset(needs)

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        now = schedule_time(view.step, view.steps, row_params["eps"])
        then = schedule_time(view.step + 1, view.steps, row_params["eps"])
        share = 1 - then / now
        if self.params.alg == "origin":
            commit = view.masked & (given(view.uniform, "uniform") < share[:, None])
        else:
            masks = view.masks_to_divide()
            count = (masks.float() * share).long()
            score = self._score(view, row_params["alg_temp"][:, None].double())
            commit = top_masked(view, score, count)
        last = view.step + 1 >= view.steps
        commit = torch.where(last[:, None], view.masked, commit)
        return Decision(commit, idle=~commit.any(dim=1))

    def _score(self, view: View, temperature: torch.Tensor) -> torch.Tensor:
        """[R, B] float64; `temperature` [R, 1] float64."""
        if self.params.alg == "topk_margin":
            score = given(view.margin, "margin").double()
        elif self.params.alg == "entropy":
            score = -given(view.entropy, "entropy").double()
        else:
            score = view.confidence.double()
        # The n largest of logits + Gumbel noise are n draws without replacement.
        uniform = given(view.uniform, "uniform").double().clamp(min=1e-38)
        noisy = score / temperature - (-uniform.log()).log()
        return torch.where(temperature > 0, noisy, score)


def schedule_time(
    step: torch.Tensor, steps: torch.Tensor, eps: torch.Tensor
) -> torch.Tensor:
    """Dream's time at the start of a step: element `step` of linspace(1, eps, S + 1).

    Bit for bit what torch.linspace gives on a CPU in float32, which counts from the
    nearer end and rounds once: a share of masks near an integer would show it.

    Args:
        step: [R] int64; past the schedule's end, time stands at `eps`.
        steps: [R] int64, S.
        eps: [R] float32.

    Returns:
        [R] float32.
    """
    slope = ((eps - 1) / steps).double()
    left = (steps - step).clamp(min=0)
    from_end = eps.double() - slope * left
    return torch.where(step < (steps + 1) // 2, 1 + slope * step, from_end).float()
