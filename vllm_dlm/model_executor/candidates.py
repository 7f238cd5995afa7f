# SPDX-License-Identifier: Apache-2.0
"""Candidates: which token each position would write, under the request's sampling.

Sampling parameters act on which token is drawn, never on how sure the model is of it:
the confidence a strategy sees is the candidate's probability under the model's own,
untempered distribution. (Measuring it after temperature makes threshold decoding
collapse: Gen-Verse/dLLM-RL issue 5.)

Several references measure it after temperature and top-k/p; so do we for strategies
that say so (`Strategy.measures`), and with `reference_exact` for families that do
(`ModelDefaults.reference_confidence`).

Rows of plain greedy requests cost nothing here: their candidate is the argmax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from vllm_dlm.kernels.draw import draw, tempered
from vllm_dlm.kernels.token_stats import TokenStats, prob_of, token_stats
from vllm_dlm.model_executor.bad_words import banned_tokens, vetoed

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

    from vllm_dlm.model_executor.segments import BlockRows
    from vllm_dlm.model_executor.state import DlmModelState


class Choice(NamedTuple):
    """The tokens that a step may write; every tensor is [R, B]."""

    candidate: torch.Tensor
    """int64."""
    confidence: torch.Tensor
    """float32: the candidate's probability."""
    entropy: torch.Tensor | None
    """float32, nats; None if not asked for."""
    margin: torch.Tensor | None
    """float32; None if not asked for."""


class Candidates:
    """Draws candidates and knows which of them end a text."""

    def __init__(self, state: DlmModelState) -> None:
        self.state = state
        slots, device = state.max_num_reqs, state.device
        self._temperature = torch.zeros(slots, device=device)
        self._top_p = torch.ones(slots, device=device)
        self._min_p = torch.zeros(slots, device=device)
        self._top_k = torch.zeros(slots, dtype=torch.int64, device=device)
        self._seed = torch.zeros(slots, dtype=torch.int64, device=device)
        self._min_tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self._stop_ids = torch.full((slots, 2), -1, dtype=torch.int64, device=device)

    def add(self, slot: int) -> None:
        """Take over a new request's sampling parameters."""
        request = self.state.requests[slot]
        params = request.params
        self._temperature[slot] = params.temperature
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._top_k[slot] = max(params.top_k, 0)
        self._seed[slot] = request.seed
        self._min_tokens[slot] = params.min_tokens
        missing = len(request.stop_ids) - self._stop_ids.shape[1]
        if missing > 0:
            more = self._stop_ids.new_full((self._stop_ids.shape[0], missing), -1)
            self._stop_ids = torch.cat([self._stop_ids, more], dim=1)
        self._stop_ids[slot] = -1
        if request.stop_ids:
            self._stop_ids[slot, : len(request.stop_ids)] = torch.tensor(
                request.stop_ids, device=self.state.device
            )

    # -- drawing -----------------------------------------------------------

    def choose(
        self,
        logits: torch.Tensor,
        stats: TokenStats,
        masked: torch.Tensor,
        step: torch.Tensor,
        plan: BlockRows,
    ) -> Choice:
        """Candidates, and how sure the model is of them.

        Args:
            logits: [N, V], the rows of `plan`, mask id banned.
            stats: of the same rows, with the statistics that strategies need.
            masked: [R, B] bool; decided positions have the argmax as candidate.
            step: [R] int64: which noise is drawn with.
        """
        choice = Choice(
            plan.spread(stats.argmax),
            plan.spread(stats.confidence),
            None if stats.entropy is None else plan.spread(stats.entropy),
            None if stats.margin is None else plan.spread(stats.margin),
        )
        requests = [
            request
            for request, slot in enumerate(plan.slots_cpu)
            if _is_special(self.state.requests[slot].params)
        ]
        if not requests:
            return choice
        rows = plan.rows_of(requests)
        raw = logits[rows]
        # A copy, also of float32: what is restricted must not move the confidence.
        processed = raw.to(torch.float32, copy=True)
        begin = 0
        for request in requests:
            end = begin + plan.row_bounds[request + 1] - plan.row_bounds[request]
            self._restrict(processed[begin:end], request, plan)
            begin = end
        owners = plan.row_requests[rows]
        slots, places = plan.slots[owners], plan.row_places[rows]
        argmax = token_stats(processed).argmax
        tempered, truncated = self._rows_to_draw(requests, plan)
        drawn = draw(
            processed,
            argmax=argmax,
            temperature=self._temperature[slots],
            top_k=self._top_k[slots],
            top_p=self._top_p[slots],
            min_p=self._min_p[slots],
            seed=self._seed[slots],
            position=plan.positions.flatten()[places],
            step=step[owners],
            rows=tempered,
            truncated_rows=truncated,
        )
        drawn = torch.where(masked.flatten()[places], drawn, argmax)
        seeded = self._seeded_greedily(requests, plan)
        drawn = torch.where(seeded, stats.argmax[rows], drawn)
        sure = prob_of(raw, drawn, stats.logsumexp[rows])
        choice = choice._replace(
            candidate=choice.candidate.clone(), confidence=choice.confidence.clone()
        )
        choice.candidate.view(-1)[places] = drawn
        choice.confidence.view(-1)[places] = sure
        self._measure_drawn(choice, processed, requests, plan)
        return choice

    def _seeded_greedily(self, requests: list[int], plan: BlockRows) -> torch.Tensor:
        """[n] bool: rows of a block's first token, which Fast-dLLM v2 never draws."""
        defaults = self.state.defaults
        is_family = defaults.seeds_blocks and defaults.shift == 1
        seeded = np.zeros(_num_rows(requests, plan), dtype=bool)
        begin = 0
        for request in requests:
            config = self.state.requests[plan.slots_cpu[request]].config
            seeded[begin] = is_family and config.reference_exact
            begin += _num_rows([request], plan)
        return torch.from_numpy(seeded).to(plan.positions.device)

    def _measure_drawn(
        self,
        choice: Choice,
        processed: torch.Tensor,
        requests: list[int],
        plan: BlockRows,
    ) -> None:
        """Overwrite statistics by those of what is drawn from, where asked for.

        Args:
            processed: [n, V], the restricted logits of the rows of `requests`.
        """
        state = self.state
        measured = [
            request
            for request in requests
            if state.requests[plan.slots_cpu[request]].measures_drawn
            and state.requests[plan.slots_cpu[request]].params.temperature > 0
        ]
        if not measured:
            return
        rows = plan.rows_of(measured)
        slots = plan.slots[plan.row_requests[rows]]
        shaped = tempered(
            processed[self._local_rows(measured, requests, plan)],
            self._temperature[slots],
            self._top_k[slots],
            self._top_p[slots],
            self._min_p[slots],
        )
        stats = token_stats(
            shaped, choice.entropy is not None, choice.margin is not None
        )
        places = plan.row_places[rows]
        tokens = choice.candidate.view(-1)[places]
        sure = prob_of(shaped, tokens, stats.logsumexp)
        choice.confidence.view(-1)[places] = sure
        if choice.entropy is not None and stats.entropy is not None:
            choice.entropy.view(-1)[places] = stats.entropy
        if choice.margin is not None and stats.margin is not None:
            choice.margin.view(-1)[places] = stats.margin

    def _rows_to_draw(
        self, requests: list[int], plan: BlockRows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of `requests` with a temperature, without and with top-k/p."""
        plain: list[int] = []
        truncated: list[int] = []
        for request in requests:
            params = self.state.requests[plan.slots_cpu[request]].params
            if params.temperature > 0:
                cut = params.top_k > 0 or params.top_p < 1
                (truncated if cut else plain).append(request)
        return (
            self._local_rows(plain, requests, plan),
            self._local_rows(truncated, requests, plan),
        )

    def _local_rows(
        self, some: list[int], requests: list[int], plan: BlockRows
    ) -> torch.Tensor:
        """[n] int64: rows of `some` of the `requests`, counted among all of theirs."""
        sizes = [_num_rows([request], plan) for request in requests]
        chosen = np.repeat(np.isin(requests, some), sizes).nonzero()[0]
        return torch.from_numpy(chosen).to(plan.positions.device)

    def noise_keys(
        self, step: torch.Tensor, plan: BlockRows
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Seed, position, step [R] of every block position, each [R * B] int64."""
        width = plan.positions.shape[1]
        return (
            self._seed[plan.slots].repeat_interleave(width),
            plan.positions.flatten(),
            step.repeat_interleave(width),
        )

    def _restrict(self, block: torch.Tensor, row: int, plan: BlockRows) -> None:
        """Apply one request's token restrictions to its [B, V] logits in place."""
        request = self.state.requests[plan.slots_cpu[row]]
        params = request.params
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=block.device)
            bias = torch.tensor(list(params.logit_bias.values()), device=block.device)
            block[:, ids] += bias.to(block.dtype)
        if params.allowed_token_ids:
            allowed = torch.tensor(params.allowed_token_ids, device=block.device)
            kept = block[:, allowed]
            block.fill_(-torch.inf)
            block[:, allowed] = kept
        if params.min_tokens:
            early = self._early(plan)[row, : len(block)]
            stop_ids = {*params.all_stop_token_ids, *request.stop_ids}
            stop = torch.tensor(sorted(stop_ids), device=block.device)
            block[early.nonzero()[:, 0, None], stop] = -torch.inf
        if params.bad_words_token_ids:
            for offset, token in self._banned(row, plan):
                block[offset, token] = -torch.inf

    # -- what ends a text --------------------------------------------------

    def _early(self, plan: BlockRows) -> torch.Tensor:
        """[R, B] bool: output positions at which `min_tokens` forbids to stop."""
        output_index = plan.positions - self.state.prompt_len[plan.slots][:, None]
        return output_index < self._min_tokens[plan.slots][:, None]

    def is_stop(self, tokens: torch.Tensor, plan: BlockRows) -> torch.Tensor:
        """[R, B] bool: the token would end its request's text there."""
        stop = self._stop_ids[plan.slots][:, None, :]
        return (tokens[:, :, None] == stop).any(dim=2) & ~self._early(plan)

    # -- bad words ---------------------------------------------------------

    def _banned(self, row: int, plan: BlockRows) -> list[tuple[int, int]]:
        """(block offset, token) pairs that would complete a bad word."""
        slot = plan.slots_cpu[row]
        words = self.state.requests[slot].params.bad_words_token_ids
        tokens, first = self._output(slot, row, plan)
        return [(i - first, token) for i, token in banned_tokens(tokens, words, first)]

    def veto_bad_words(
        self,
        commit: torch.Tensor,
        edit: torch.Tensor,
        new_tokens: torch.Tensor,
        plan: BlockRows,
    ) -> None:
        """Withdraw, in place, commits and edits that would write a bad word."""
        for row, slot in enumerate(plan.slots_cpu):
            words = self.state.requests[slot].params.bad_words_token_ids
            if not words:
                continue
            tokens, first = self._output(slot, row, plan)
            write = commit[row] | edit[row]
            writes = {
                first + offset: int(new_tokens[row, offset])
                for offset in write.nonzero()[:, 0].tolist()
            }
            for index in vetoed(tokens, writes, words):
                commit[row, index - first] = False
                edit[row, index - first] = False

    def _output(
        self, slot: int, row: int, plan: BlockRows
    ) -> tuple[list[int | None], int]:
        """Output tokens up to the block's end (None: masked); the block's index."""
        begin = int(self.state.prompt_len[slot])
        block_start = int(plan.positions[row, 0])
        end = block_start + int(plan.valid[row].sum())
        tokens = self.state.tokens[slot, begin:end].tolist()
        masked = self.state.masked[slot, begin:end].tolist()
        known = [
            None if hidden else token
            for token, hidden in zip(tokens, masked, strict=True)
        ]
        return known, block_start - begin


def _num_rows(requests: list[int], plan: BlockRows) -> int:
    bounds = plan.row_bounds
    return sum(bounds[request + 1] - bounds[request] for request in requests)


def _is_special(params: SamplingParams) -> bool:
    """Whether a request's candidates may differ from the argmax."""
    return bool(
        params.temperature > 0
        or params.logit_bias
        or params.allowed_token_ids
        or params.min_tokens
        or params.bad_words_token_ids
    )
