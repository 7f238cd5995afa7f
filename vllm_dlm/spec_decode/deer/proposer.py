# SPDX-License-Identifier: Apache-2.0
"""DEER in vLLM: a batch's texts in, a block of drafts for each out, in one step.

`drafting.py` plans the drafter's forward, and `network.py` runs it.
"""

from __future__ import annotations

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
from vllm_dlm.spec_decode.deer.network import DiffusionDrafter
from vllm_dlm.spec_decode.drafter import Batch, Drafts
from vllm_dlm.spec_decode.sampling import draw_drafts


class DeerProposer(DiffusionDrafter):
    """Drafts k tokens in one denoising step of a diffusion model."""

    def draft(self, batch: Batch) -> Drafts:
        """Draft by one denoising step for all requests, in few forwards."""
        starts, ends, widths = self._work(batch)
        rows = np.flatnonzero(ends > starts)
        tokens: list[list[int]] = [[] for _ in batch.request_ids]
        probs = None
        if not batch.sampling.all_greedy and widths.any():
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

    def _work(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[R] each: first position to compute, end of the text, masks behind it."""
        attention = batch.attention
        # Tokens that the target has computed, and those of them in this step.
        computed = attention.seq_lens_cpu_upper_bound.numpy().astype(np.int64)
        new = np.diff(attention.query_start_loc_cpu.numpy()).astype(np.int64)
        # Only the token just sampled may be missing: else it is a part of a prompt.
        is_last = computed == batch.num_tokens - 1
        widths = np.where(is_last, batch.limits, 0)
        widths = np.clip(self.longest - batch.num_tokens, 0, widths)
        if self.context == "recompute":
            ends = np.where(widths > 0, batch.num_tokens, 0)
            return np.zeros_like(ends), ends, widths
        # vLLM reserves a page less than the masks need where they end behind one.
        table = self.runner.input_batch.block_table[self.kv_cache_gid]
        reserved = table.num_blocks_per_row[: len(widths)] * table.block_size
        widths = np.clip(reserved - batch.num_tokens, 0, widths)
        ends = np.where(widths > 0, batch.num_tokens, computed)
        ends = np.minimum(ends, self.longest)
        return first_rows(self.defaults, computed - new), ends, widths

    def _draw(
        self,
        batch: Batch,
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
    def _parameters(batch: Batch, name: str) -> np.ndarray:
        """[R]: a sampling parameter of each request."""
        return np.array([getattr(row, name) for row in batch.parameters])
