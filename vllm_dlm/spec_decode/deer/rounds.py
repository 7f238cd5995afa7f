# SPDX-License-Identifier: Apache-2.0
"""A round of DEER: a batch's texts in, a block of drafts for each out, in one step.

`drafting.py` plans the drafter's forward, and `network.py` runs it. This is the same on
both of vLLM's model runners, which `proposer.py` (V1) and `speculator.py` (V2) face.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from vllm_dlm.model_executor.planning.block_rows import upload
from vllm_dlm.model_executor.planning.segments import ragged
from vllm_dlm.model_executor.sampling.logits import tile_rows
from vllm_dlm.spec_decode.deer.drafting import (
    first_rows,
    greedy_drafts,
    plan_forward,
    split,
)
from vllm_dlm.spec_decode.deer.network import DiffusionNetwork
from vllm_dlm.spec_decode.drafts import Drafts
from vllm_dlm.spec_decode.sampling import draw_drafts

if TYPE_CHECKING:
    from vllm import SamplingParams


class Texts(Protocol):
    """What a round knows of R requests, after the target's step."""

    @property
    def request_ids(self) -> list[str]:
        """[R], for who looks on."""

    @property
    def num_tokens(self) -> np.ndarray:
        """[R] int64: prompt and output, the token just sampled included."""

    @property
    def limits(self) -> np.ndarray:
        """[R] int64: most tokens that a draft may have; 0 for no draft."""

    @property
    def token_ids(self) -> np.ndarray:
        """[R, L] int32; row i holds `num_tokens[i]` tokens, and room for its draft."""

    @property
    def computed(self) -> np.ndarray:
        """[R] int64: tokens whose keys the target has, without rejected drafts."""

    @property
    def computed_before(self) -> np.ndarray:
        """[R] int64: those of them that it had before the step."""

    @property
    def parameters(self) -> list[SamplingParams]:
        """[R], each request's own."""

    @property
    def seeds(self) -> np.ndarray:
        """[R] int64."""

    @property
    def all_greedy(self) -> bool:
        """Whether no request draws."""


class DeerRounds(DiffusionNetwork):
    """Drafts k tokens in one denoising step of a diffusion model."""

    def draft(self, batch: Texts) -> Drafts:
        """Draft by one denoising step for all requests, in few forwards."""
        starts, ends, widths = self._work(batch)
        rows = np.flatnonzero(ends > starts)
        # A request may read pages that another computes in this very step: whoever
        # begins further left goes first, if there are several forwards.
        rows = rows[np.argsort(starts[rows], kind="stable")]
        tokens: list[list[int]] = [[] for _ in batch.request_ids]
        probs = None
        if not batch.all_greedy and widths.any():
            shape = (len(widths), int(widths.max()), self.vocab_size)
            probs = torch.zeros(shape, dtype=torch.float32, device=self.device)
        drawn = []
        for part in split((ends + widths - starts)[rows], self.most_rows):
            some = rows[part]
            plan = plan_forward(
                self.defaults, some, starts[some], ends[some], widths[some]
            )
            hidden = self.denoise(plan, batch.token_ids)
            if len(plan.logits_rows):
                drawn.append(self._draw(batch, hidden, some, widths[some], probs))
        if drawn:
            flat = torch.cat(drawn).tolist()
            for row, last in zip(rows, np.cumsum(widths[rows]), strict=True):
                tokens[row] = flat[last - widths[row] : last]
        return Drafts(tokens, probs)

    def _work(self, batch: Texts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[R] each: first position to compute, end of the text, masks behind it."""
        computed = batch.computed
        # Only the token just sampled may be missing: else it is a part of a prompt.
        is_last = computed == batch.num_tokens - 1
        widths = np.where(is_last, batch.limits, 0)
        widths = np.clip(self.longest - batch.num_tokens, 0, widths)
        if self.context == "recompute":
            ends = np.where(widths > 0, batch.num_tokens, 0)
            return np.zeros_like(ends), ends, widths
        # vLLM reserves a page less than the masks need where they end behind one.
        widths = np.clip(self.reserved() - batch.num_tokens, 0, widths)
        ends = np.where(widths > 0, batch.num_tokens, computed)
        ends = np.minimum(ends, self.longest)
        return first_rows(self.defaults, batch.computed_before), ends, widths

    def _draw(
        self,
        batch: Texts,
        hidden: torch.Tensor,
        rows: np.ndarray,
        widths: np.ndarray,
        probs: torch.Tensor | None,
    ) -> torch.Tensor:
        """[M] int64: a token for each row of hidden states [M, H]; fills in `probs`.

        Args:
            rows: [R] rows of the batch, whose `widths` [R] add up to M.
        """
        mask_id = self.defaults.mask_token_id
        step = tile_rows(self.vocab_size, hidden.dtype, hidden.device)
        tiles = [slice(i, i + step) for i in range(0, len(hidden), step)]
        if probs is None:
            return torch.cat(
                [greedy_drafts(self._logits(hidden[tile]), mask_id) for tile in tiles]
            )
        owners, places = ragged(widths)
        requests = rows[owners]
        of_row, offsets, positions, seeds, top_k = upload(
            self.device,
            requests,
            places,
            batch.num_tokens[requests] + places,
            batch.seeds[requests],
            self._parameters(batch, "top_k")[requests],
        )
        temperature, top_p = (
            torch.from_numpy(self._parameters(batch, name)[requests])
            .float()
            .to(self.device)
            for name in ("temperature", "top_p")
        )
        drawn = []
        for tile in tiles:
            tokens, q = draw_drafts(
                self._logits(hidden[tile]),
                temperature[tile],
                top_k[tile],
                top_p[tile],
                seeds[tile],
                positions[tile],
                banned_ids=[mask_id],
            )
            probs[of_row[tile], offsets[tile]] = q
            drawn.append(tokens)
        return torch.cat(drawn)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, V] of hidden states [n, H]; on all ranks the same."""
        logits: torch.Tensor = self.model.gathered(self.model.logits(hidden))
        return logits

    @staticmethod
    def _parameters(batch: Texts, name: str) -> np.ndarray:
        """[R]: a sampling parameter of each request."""
        return np.array([getattr(row, name) for row in batch.parameters])
