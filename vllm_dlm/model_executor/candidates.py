# SPDX-License-Identifier: Apache-2.0
"""Candidates: which token each position would write, under the request's sampling.

Sampling parameters act on which token is drawn, never on how sure the model is of it:
the confidence a strategy sees is the candidate's probability under the model's own,
untempered distribution. (Measuring it after temperature makes threshold decoding
collapse: Gen-Verse/dLLM-RL issue 5.)

Several references measure it after temperature and top-k/p; with `reference_exact` so
do we, for families that say so (`ModelDefaults.reference_confidence`).

Rows of plain greedy requests cost nothing here: their candidate is the argmax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_dlm.kernels.draw import draw, tempered
from vllm_dlm.kernels.token_stats import TokenStats, prob_of, token_stats
from vllm_dlm.model_executor.bad_words import banned_tokens, vetoed

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

    from vllm_dlm.model_executor.segments import SegmentPlan
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
        plan: SegmentPlan,
    ) -> Choice:
        """Candidates, and how sure the model is of them.

        Args:
            logits: [R * B, V], mask id banned.
            stats: of the same rows, with the statistics that strategies need.
            masked: [R, B] bool; decided positions keep the argmax as candidate.
        """
        shape = masked.shape
        choice = Choice(
            stats.argmax.view(shape),
            stats.confidence.view(shape),
            None if stats.entropy is None else stats.entropy.view(shape),
            None if stats.margin is None else stats.margin.view(shape),
        )
        rows = [
            row
            for row, slot in enumerate(plan.slots_cpu)
            if _is_special(self.state.requests[slot].params)
        ]
        if not rows:
            return choice
        width = shape[1]
        index = torch.tensor(rows, device=logits.device)
        flat = _block_rows(index, width)
        raw = logits[flat]
        # A copy, also of float32: what is restricted must not move the confidence.
        processed = raw.to(torch.float32, copy=True)
        for block, row in zip(processed.view(len(rows), width, -1), rows, strict=True):
            self._restrict(block, row, plan)
        slots = plan.slots[index].repeat_interleave(width)
        tempered, truncated = self._rows_to_draw(rows, plan)
        drawn = draw(
            processed,
            argmax=token_stats(processed).argmax,
            temperature=self._temperature[slots],
            top_k=self._top_k[slots],
            top_p=self._top_p[slots],
            min_p=self._min_p[slots],
            seed=self._seed[slots],
            position=plan.positions[index].flatten(),
            step=self.state.step[slots],
            rows=_block_rows(tempered, width),
            truncated_rows=_block_rows(truncated, width),
        )
        seeded = self._seeded_greedily(rows, plan)
        drawn = torch.where(seeded, stats.argmax[flat], drawn)
        sure = prob_of(raw, drawn, stats.logsumexp[flat])
        part = (len(rows), width)
        here = masked[index]
        choice = choice._replace(
            candidate=choice.candidate.clone(), confidence=choice.confidence.clone()
        )
        choice.candidate[index] = torch.where(
            here, drawn.view(part), choice.candidate[index]
        )
        choice.confidence[index] = torch.where(
            here, sure.view(part), choice.confidence[index]
        )
        self._measure_drawn(choice, processed, index, rows, plan)
        return choice

    def _seeded_greedily(self, rows: list[int], plan: SegmentPlan) -> torch.Tensor:
        """[rows * B] bool: a block's first token, which Fast-dLLM v2 never draws."""
        width = plan.positions.shape[1]
        exact = torch.tensor([self._is_exact(row, plan) for row in rows])
        first = torch.arange(width) == 0
        defaults = self.state.defaults
        is_family = defaults.seeds_blocks and defaults.shift == 1
        seeded = exact[:, None] & first & is_family
        return seeded.flatten().to(plan.positions.device)

    def _is_exact(self, row: int, plan: SegmentPlan) -> bool:
        return self.state.requests[plan.slots_cpu[row]].config.reference_exact

    def _measure_drawn(
        self,
        choice: Choice,
        processed: torch.Tensor,
        index: torch.Tensor,
        rows: list[int],
        plan: SegmentPlan,
    ) -> None:
        """`reference_exact`: overwrite statistics by those of what is drawn from."""
        if self.state.defaults.reference_confidence != "drawn":
            return
        exact = [
            i
            for i, row in enumerate(rows)
            if self._is_exact(row, plan)
            and self.state.requests[plan.slots_cpu[row]].params.temperature > 0
        ]
        if not exact:
            return
        width = plan.positions.shape[1]
        local = torch.tensor(exact, device=index.device)
        chosen = index[local]
        slots = plan.slots[chosen].repeat_interleave(width)
        shaped = tempered(
            processed[_block_rows(local, width)],
            self._temperature[slots],
            self._top_k[slots],
            self._top_p[slots],
            self._min_p[slots],
        )
        stats = token_stats(
            shaped, choice.entropy is not None, choice.margin is not None
        )
        part = (len(exact), width)
        tokens = choice.candidate[chosen].flatten()
        sure = prob_of(shaped, tokens, stats.logsumexp)
        choice.confidence[chosen] = sure.view(part)
        if choice.entropy is not None and stats.entropy is not None:
            choice.entropy[chosen] = stats.entropy.view(part)
        if choice.margin is not None and stats.margin is not None:
            choice.margin[chosen] = stats.margin.view(part)

    def _rows_to_draw(
        self, rows: list[int], plan: SegmentPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `rows`, by index: those with a temperature, without and with top-k/p."""
        params = [self.state.requests[plan.slots_cpu[row]].params for row in rows]
        warm = [i for i, p in enumerate(params) if p.temperature > 0]
        truncated = [i for i in warm if params[i].top_k > 0 or params[i].top_p < 1]
        tempered = [i for i in warm if i not in truncated]
        device = plan.slots.device
        return (
            torch.tensor(tempered, dtype=torch.int64, device=device),
            torch.tensor(truncated, dtype=torch.int64, device=device),
        )

    def noise_keys(
        self, plan: SegmentPlan
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Seed, position, step of every block position, each [R * B] int64."""
        width = plan.positions.shape[1]
        return (
            self._seed[plan.slots].repeat_interleave(width),
            plan.positions.flatten(),
            self.state.step[plan.slots].repeat_interleave(width),
        )

    def _restrict(self, block: torch.Tensor, row: int, plan: SegmentPlan) -> None:
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
            early = self._early(plan)[row]
            stop_ids = {*params.all_stop_token_ids, *request.stop_ids}
            stop = torch.tensor(sorted(stop_ids), device=block.device)
            block[early.nonzero()[:, 0, None], stop] = -torch.inf
        if params.bad_words_token_ids:
            for offset, token in self._banned(row, plan):
                block[offset, token] = -torch.inf

    # -- what ends a text --------------------------------------------------

    def _early(self, plan: SegmentPlan) -> torch.Tensor:
        """[R, B] bool: output positions at which `min_tokens` forbids to stop."""
        output_index = plan.positions - self.state.prompt_len[plan.slots][:, None]
        return output_index < self._min_tokens[plan.slots][:, None]

    def is_stop(self, tokens: torch.Tensor, plan: SegmentPlan) -> torch.Tensor:
        """[R, B] bool: the token would end its request's text there."""
        stop = self._stop_ids[plan.slots][:, None, :]
        return (tokens[:, :, None] == stop).any(dim=2) & ~self._early(plan)

    # -- bad words ---------------------------------------------------------

    def _banned(self, row: int, plan: SegmentPlan) -> list[tuple[int, int]]:
        """(block offset, token) pairs that would complete a bad word."""
        slot = plan.slots_cpu[row]
        words = self.state.requests[slot].params.bad_words_token_ids
        tokens, first = self._output(slot, row, plan)
        return [(i - first, token) for i, token in banned_tokens(tokens, words, first)]

    def veto_bad_words(
        self, commit: torch.Tensor, new_tokens: torch.Tensor, plan: SegmentPlan
    ) -> torch.Tensor:
        """Withdraw commits that together would write a bad word."""
        for row, slot in enumerate(plan.slots_cpu):
            words = self.state.requests[slot].params.bad_words_token_ids
            if not words or all(len(word) == 1 for word in words):
                continue
            tokens, first = self._output(slot, row, plan)
            writes = {
                first + offset: int(new_tokens[row, offset])
                for offset in commit[row].nonzero()[:, 0].tolist()
            }
            for index in vetoed(tokens, writes, words):
                commit[row, index - first] = False
        return commit

    def _output(
        self, slot: int, row: int, plan: SegmentPlan
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


def _block_rows(index: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of a flattened [R, B] tensor that belong to the requests of `index`."""
    offsets = torch.arange(width, device=index.device)
    return (index[:, None] * width + offsets).flatten()


def _is_special(params: SamplingParams) -> bool:
    """Whether a request's candidates may differ from the argmax."""
    return bool(
        params.temperature > 0
        or params.logit_bias
        or params.allowed_token_ids
        or params.min_tokens
        or params.bad_words_token_ids
    )
