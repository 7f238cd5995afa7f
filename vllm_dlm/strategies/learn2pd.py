# SPDX-License-Identifier: Apache-2.0
"""Learn2PD: a tiny network learned which tokens are final already.

commit = { i masked : sigmoid(filter(c))_i > threshold } and the `scheduled` most
confident masked positions, where c are the confidences of all B block positions: those
of decided positions are the model's in its own best token, and positions beyond the
canvas end count as 1.0. By default end-of-text prediction drops the padding (the
option `eotp`, part of the same paper).
Source: Learning to Parallel Decode, arXiv 2509.25188.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping

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
from vllm_dlm.strategies.learn2pd_files import (
    find_filter,
    listing,
    named_filter,
    times_learned,
    warn_if_foreign,
)
from vllm_dlm.strategies.learn2pd_filter import Filter

logger = logging.getLogger(__name__)

FALLBACK_CONFIDENCE = 0.9
"""Without a filter: the threshold rule's value, Fast-dLLM's default."""


class Learn2PDParams(Params):
    """Parameters of `Learn2PD`."""

    threshold: float = Field(
        default=0.96,
        gt=0.0,
        lt=1.0,
        description=(
            "Cut on the filter's sigmoid above which a token is written. Lower is "
            "faster and less exact."
        ),
    )
    filter: str | None = Field(
        default=None,
        description=(
            "Filter file; by default the one in the model folder or among the learned "
            "ones that fits the block length and the cache policy."
        ),
        # A path on the server's disk: not for its clients to choose.
        json_schema_extra={"server_only": True},
    )


class Learn2PD(Strategy):
    """Write the masked positions that the filter takes for final."""

    name = "learn2pd"
    paper = "arXiv 2509.25188 (Learn2PD + EoTP)"
    summary = "a tiny learned filter says which tokens are final; padding is dropped"
    Params = Learn2PDParams
    logit_rows = "block"
    eotp = "block"
    schedule = True

    params: Learn2PDParams

    def __init__(
        self, params: Learn2PDParams, block_length: int, context: Context
    ) -> None:
        super().__init__(params, block_length, context)
        self._times_learned = times_learned(context, block_length)
        self.has_filter = True
        """False while the threshold rule stands in for a filter not learned yet."""
        if params.filter is not None:
            filter = named_filter(params.filter, context, block_length)
            warn_if_foreign(filter, context, params.filter)
        else:
            found = context.agreed(find_filter(context, block_length))
            self.has_filter = found is not None
            filter = found or Filter.identity(
                block_length,
                FALLBACK_CONFIDENCE,
                Learn2PDParams.model_fields["threshold"].default,
            )
            if found is None:
                learning = (context.options or {}).get("online_learning", False)
                _announce_fallback(
                    context.model,
                    block_length,
                    context.cache,
                    listing(context),
                    "until a filter is learned" if learning else "as by `threshold`",
                )
        # Float64, so that neither the batch size nor TF32 moves a position over the
        # cut: the two matrices are small.
        self.filter = filter.to(context.device, torch.float64)

    def is_current(self) -> bool:
        """Until this process has learned another filter."""
        learned = times_learned(self.context, self.block_length)
        return learned == self._times_learned

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        logits = self.filter.apply(torch.where(view.valid, view.confidence, 1.0))
        # sigmoid(z) > t as z > logit(t): sigmoid saturates where z does not.
        cut = torch.logit(row_params["threshold"].to(logits.dtype))
        commit = (logits > cut[:, None]) & view.masked
        commit |= top_masked(view, view.confidence, view.scheduled)
        return Decision(commit)

    def reference_steps(self, params: AnyParams, steps: int) -> int | None:
        """The published loop counts a schedule out, but ends with the last mask."""
        return None

    @classmethod
    def validate(cls, params: AnyParams, block_length: int, context: Context) -> None:
        if isinstance(params, Learn2PDParams) and params.filter is not None:
            named_filter(params.filter, context, block_length)


@functools.cache
def _announce_fallback(
    model: str, block_length: int, cache: str, others: str, how_long: str
) -> None:
    logger.warning(
        "no Learn2PD filter of %s for block length %d and cache %r (available: %s): "
        "tokens are written at confidence >= %s %s",
        model,
        block_length,
        cache,
        others,
        FALLBACK_CONFIDENCE,
        how_long,
    )
