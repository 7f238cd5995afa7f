# SPDX-License-Identifier: Apache-2.0
"""SpecDec++ in vLLM: an autoregressive draft model whose drafts end by a head's word.

The draft model is one of vLLM's own, with its keys in pages as the target's. A round's
first pass reads all tokens of the target's step, and the token just sampled; then each
pass reads one drafted token per row. Rows that have stopped leave the batch, so a short
draft costs few passes, not only a short verification.
Source: arXiv 2405.19715; the rule is in `specdec_pp.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_dlm.spec_decode.drafter import Batch, Drafter, Drafts
from vllm_dlm.spec_decode.options import SpecDecPlusPlus
from vllm_dlm.spec_decode.sampling import draw_drafts
from vllm_dlm.spec_decode.specdec_pp import AcceptanceHead, StopRule

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

logger = init_logger(__name__)


class SpecDecPlusPlusProposer(Drafter):
    """Drafts token by token until a rejection has become probable.

    `counts`: "rounds"; "forwards" of the draft model and the token "rows" in them;
    "drafted" tokens.

    Raises:
        ValueError: no head, or one that does not fit the draft model; a draft model
            with a shorter context than the target; a mixture of experts over data
            parallel ranks, which would have to draft equally long.
    """

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, runner: Any
    ) -> None:
        super().__init__(vllm_config, device, runner)
        options = cast(SpecDecPlusPlus, self.options)
        self.rule = StopRule(
            options.stop_threshold, options.min_tokens, options.num_speculative_tokens
        )
        draft = self.draft_model_config
        self.head = AcceptanceHead.load(
            options.head or draft.model, draft.get_hidden_size()
        ).to(device)
        if draft.max_model_len < self.max_model_len:
            raise ValueError(
                f"the draft model {draft.model} takes {draft.max_model_len} tokens, the "
                f"target is served with {self.max_model_len}: set max_model_len to "
                f"{draft.max_model_len} or less, or take another draft model"
            )
        if vllm_config.parallel_config.data_parallel_size > 1:
            raise ValueError(
                "specdec++ does not go with data parallel mixtures of experts: their "
                "ranks compute together, and each would draft another length"
            )
        logger.info(
            "SpecDec++: acceptance head %s",
            ", ".join(f"{name} {text}" for name, text in self.head.about.items())
            or "of unknown training",
        )

    def draft(self, batch: Batch) -> Drafts:
        """One round: the first pass over all rows, then the rows that go on."""
        self.counts["rounds"] += 1
        hidden, positions, attention = self._first_pass(batch)
        rows = np.flatnonzero(batch.limits)
        tokens: list[list[int]] = [[] for _ in batch.limits]
        if not len(rows):
            return Drafts(tokens)
        longest = int(batch.limits.max())
        drawn = _Draws(batch, self.device)
        stops = [_stop_ids(parameters) for parameters in batch.parameters]
        limits = torch.from_numpy(batch.limits).to(self.device)
        kept = torch.from_numpy(rows).to(self.device)
        accepted = torch.ones(len(rows), device=self.device)
        for drafted in range(1, longest + 1):
            # hidden, positions and attention are still those of the step before.
            hidden, positions = hidden[kept], positions[kept]
            ...
        return Drafts(tokens)
