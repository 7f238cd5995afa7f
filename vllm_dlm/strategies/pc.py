# SPDX-License-Identifier: Apache-2.0
"""PC-Sampler: prefer what is early, what is sure, and what is no filler.

score_i = exp(-position_weight i) min(-c_i log f(a_i), most), where i is the index in
the output, c_i the probability of the token a_i there, and f(a_i) how often that token
occurs in ordinary text. The step schedule's number of best positions is written. The
weight of positions makes the order go roughly from left to right; the frequencies keep
commas, articles and ends of text, which a model is sure of too soon, from being written
first. `most` keeps rare tokens from outweighing all else.
Source: PC-Sampler, arXiv 2508.13021, and NEUIR/PC-Sampler's code.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from vllm_dlm.strategies.base import (
    AnyParams,
    Context,
    Decision,
    Params,
    Strategy,
    View,
    top_masked,
)
from vllm_dlm.strategies.presets import Preset
from vllm_dlm.strategies.token_frequencies import (
    find_frequencies,
    load_frequencies,
    places,
)

logger = logging.getLogger(__name__)


class PcSamplerParams(Params):
    """Parameters of `PcSampler`."""

    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            {"position_weight": 0.25, "most": 10.0},
            "NEUIR/PC-Sampler, README.md",
            "block_length canvas",
        ),
        "sudoku": Preset(
            {"position_weight": 0.0, "most": 10.0},
            "NEUIR/PC-Sampler, README.md",
            "block_length canvas",
        ),
        "countdown": Preset(
            {"position_weight": 0.5, "most": 10.0},
            "NEUIR/PC-Sampler, README.md; its script has 1",
            "block_length canvas",
        ),
    }

    position_weight: float = Field(
        default=0.25,
        ge=0.0,
        le=100.0,
        description=(
            "How much an earlier position is preferred (lambda): each position to the "
            "right divides the score by e^position_weight. 0 does not look at "
            "positions, some units write from left to right."
        ),
    )
    most: float = Field(
        default=10.0,
        gt=0.0,
        le=1e6,
        description=(
            "Largest weight of a token before its position counts (alpha), in nats: "
            "-c log f beyond it makes no difference."
        ),
    )
    frequencies: str | None = Field(
        default=None,
        description=(
            "File of token frequencies, as `vllm-dlm count-tokens` writes it; by "
            "default the one in the model folder (pc/frequencies.safetensors) or among "
            "the learned filters."
        ),
        # A path on the server's disk: not for its clients to choose.
        json_schema_extra={"server_only": True},
    )


class PcSampler(Strategy):
    """Write the scheduled number of positions that are early, sure and telling."""

    name = "pc"
    paper = "arXiv 2508.13021 (PC-Sampler)"
    summary = "early, sure and rare tokens first; as many as scheduled"
    Params = PcSamplerParams
    schedule = True
    counts_out = True

    params: PcSamplerParams

    def __init__(
        self, params: PcSamplerParams, block_length: int, context: Context
    ) -> None:
        super().__init__(params, block_length, context)
        if params.frequencies is not None:
            frequencies = load_frequencies(params.frequencies)
        else:
            found = find_frequencies(context)
            # One nat each: then the score is exp(-position_weight * i) * c_i.
            frequencies = torch.tensor([math.exp(-1)]) if found is None else found
            if found is None:
                _announce_fallback(", ".join(map(str, places(context))))
        # Float64: positions and surprise are added up below.
        self._surprise = -frequencies.to(context.device, torch.float64).log()
        self._surprise_of_others = self._surprise.max()

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        weight = view.confidence.double() * self._surprise_of(view.candidate)
        weight = torch.minimum(weight, row_params["most"].double()[:, None])
        # The logarithm of the score: its exponential vanishes in long outputs.
        distance = row_params["position_weight"].double()[:, None] * view.positions
        score = weight.clamp(min=1e-300).log() - distance
        return Decision(top_masked(view, score, view.scheduled))

    def _surprise_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """-log f of tokens [R, B], float64; ids beyond the table count as rarest."""
        known = tokens < len(self._surprise)
        found = self._surprise[torch.where(known, tokens, 0)]
        return torch.where(known, found, self._surprise_of_others)

    @classmethod
    def validate(cls, params: AnyParams, block_length: int, context: Context) -> None:
        if isinstance(params, PcSamplerParams) and params.frequencies is not None:
            load_frequencies(params.frequencies)


@functools.cache
def _announce_fallback(looked_in: str) -> None:
    logger.warning(
        "no token frequencies for the strategy pc (looked for %s): all tokens count as "
        "equally frequent. `vllm-dlm count-tokens` makes a table",
        looked_in,
    )
